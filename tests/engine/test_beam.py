"""Beam search, against transformers' own on a model with the same logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from miaotui.engine.params import BeamSearchParams, SamplingParams
from miaotui.errors import RequestError
from tests.engine.toys import finish, history_logits, naive_greedy, toy_engine

V = 24
"""Small, so that ends come up; the logits are sharp enough that beams are not tied."""


@pytest.fixture(scope="module")
def oracle() -> Any:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_outputs import CausalLMOutputWithPast

    class Toy(transformers.PreTrainedModel, transformers.GenerationMixin):  # type: ignore[misc, name-defined]
        config_class = transformers.PretrainedConfig

        def __init__(self) -> None:
            super().__init__(transformers.PretrainedConfig(vocab_size=V, is_encoder_decoder=False))
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def prepare_inputs_for_generation(
            self, input_ids: Any, attention_mask: Any = None, **ignored: Any
        ) -> dict[str, Any]:
            return {"input_ids": input_ids}

        def forward(self, input_ids: Any, attention_mask: Any = None, **ignored: Any) -> Any:
            rows = [history_logits(row, V, 6.0) for row in input_ids.tolist()]
            return CausalLMOutputWithPast(logits=torch.from_numpy(np.stack(rows))[:, None, :])

    return Toy()


def transformers_beams(oracle: Any, prompt: list[int], params: BeamSearchParams, eos: tuple[int, ...]) -> Any:
    import torch

    count = params.n or params.beam_width
    generated = oracle.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        num_beams=params.beam_width,
        num_return_sequences=count,
        max_new_tokens=params.max_tokens,
        do_sample=False,
        early_stopping=params.early_stopping,
        length_penalty=params.length_penalty,
        eos_token_id=list(eos) if eos and not params.ignore_eos else None,
        pad_token_id=V - 1,
        use_cache=False,
        output_scores=True,
        return_dict_in_generate=True,
    )
    lengths = (generated.beam_indices >= 0).sum(dim=1).tolist()
    sequences = generated.sequences[:, len(prompt) :].tolist()
    return [s[:n] for s, n in zip(sequences, lengths, strict=True)], generated.sequences_scores.tolist()


@pytest.mark.parametrize("blocks", [12, 256])
@pytest.mark.parametrize("early_stopping", [False, True])
@pytest.mark.parametrize(
    ("width", "length_penalty", "eos", "max_tokens"),
    [(2, 1.0, (0,), 12), (3, 0.0, (0, 5), 10), (4, 2.0, (0, 1, 2, 3), 20), (3, -1.0, (), 7)],
)
def test_beams_are_those_of_transformers(
    oracle: Any, width: int, length_penalty: float, eos: tuple[int, ...], max_tokens: int, early_stopping: bool,
    blocks: int,
) -> None:  # fmt: skip
    params = BeamSearchParams(width, max_tokens, length_penalty=length_penalty, early_stopping=early_stopping)
    engine = toy_engine(vocab=V, sharpness=6.0, eos=eos, blocks=blocks, seqs=6, budget=9)
    prompts = [[1, 2, 3], [7] * 15, list(range(17))]
    ids = [engine.add_request(prompt, params) for prompt in prompts]
    other = engine.add_request([4], SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True))
    done = finish(engine)
    for request_id, prompt in zip(ids, prompts, strict=True):
        tokens, scores = transformers_beams(oracle, prompt, params, eos)
        found = done[request_id].outputs
        assert [o.token_ids for o in found] == tokens
        for output, score in zip(found, scores, strict=True):
            assert output.cumulative_logprob is not None
            own = output.cumulative_logprob / len(output.token_ids) ** length_penalty
            assert own == pytest.approx(score, rel=1e-4)
            assert output.finish_reason == ("stop" if output.token_ids[-1] in eos else "length")
    assert done[other].outputs[0].token_ids == naive_greedy([4], 40, V, 6.0)
    assert engine.stats.blocks_in_use == 0


def test_one_beam_is_greedy() -> None:
    engine = toy_engine()
    request = engine.add_request([1, 2], BeamSearchParams(1, 10))
    assert finish(engine)[request].outputs[0].token_ids == naive_greedy([1, 2], 10)


def test_fewer_beams_may_be_returned() -> None:
    engine = toy_engine()
    every = engine.add_request([1, 2], BeamSearchParams(4, 10))
    best = engine.add_request([1, 2], BeamSearchParams(4, 10, n=2))
    done = finish(engine)
    assert [o.token_ids for o in done[best].outputs] == [o.token_ids for o in done[every].outputs[:2]]


def test_two_searches_that_fill_the_cache_do_not_wait_for_each_other() -> None:
    engine = toy_engine(blocks=9, seqs=4)
    params = BeamSearchParams(3, 30)
    ids = [engine.add_request([i, i + 1], params) for i in range(3)]
    done = finish(engine)
    wide = toy_engine()
    again = [wide.add_request([i, i + 1], params) for i in range(3)]
    wanted = finish(wide)
    assert [[o.token_ids for o in done[i].outputs] for i in ids] == [
        [o.token_ids for o in wanted[i].outputs] for i in again
    ]


def test_a_search_can_be_cancelled() -> None:
    engine = toy_engine()
    request = engine.add_request([1, 2], BeamSearchParams(4, 30))
    for _ in range(5):
        engine.step()
        engine.check_integrity()
    output = engine.cancel(request)
    assert output is not None
    assert output.finished
    engine.check_integrity()
    assert not engine.has_work
    assert engine.stats.blocks_in_use == 0


def test_beams_that_cannot_run_together_are_refused() -> None:
    with pytest.raises(RequestError, match="8 beams are more than the 4 sequences"):
        toy_engine(seqs=4).add_request([1], BeamSearchParams(8, 10))
    with pytest.raises(RequestError, match="3 beams of 51 positions need 12 cache blocks of 16, of 10"):
        toy_engine(blocks=10).add_request([1], BeamSearchParams(3, 50))
