"""Tasks of EleutherAI's lm-evaluation-harness, answered by the engine that serves.

Choices are scored through the executor, as perplexity is; free answers come from `LLM.generate`, greedy unless the task
says otherwise. One of the two is in memory at a time. The harness is an extra: nothing here is imported without it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from miaotui.measure.quality_data import Window
from miaotui.measure.scoring import Listening, Opened, Rows, Scorer, Settings
from miaotui.model.families import read_spec

MOST_LENGTH = 4096
"""Positions, where a model was made for more: what tasks need at the most."""
NEW_TOKENS = 256
"""Of a free answer, where the task does not say."""

Told = Callable[[int, int], None]


class EngineLM(TemplateLM):  # type: ignore[misc]
    """A model as the harness sees it. Close it to free its memory."""

    def __init__(self, model: str, settings: Settings, tell: Told = lambda done, total: None) -> None:
        super().__init__()
        self._opened, self._settings, self._tell = Opened.of(model), settings, tell
        self.max_length = min(read_spec(self._opened.checkpoint)[0].max_position, MOST_LENGTH)
        self._scorer: Scorer | None = None
        self._llm: Any = None

    # -- text --------------------------------------------------------------------------------------------
    @property
    def eot_token_id(self) -> int:
        return min(self._opened.tokenizer.eos_ids, default=0)

    @property
    def prefix_token_id(self) -> int:
        found = self._opened.tokenizer.bos_id
        return self.eot_token_id if found is None else found

    @property
    def tokenizer_name(self) -> str:
        return self._opened.model.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """As the model's own tokenizer does it; a text that begins with BOS gets no second one."""
        tokenizer = self._opened.tokenizer
        ids = tokenizer.encode(string, add_special_tokens=False, parse_special=True)
        wanted = tokenizer.add_bos if add_special_tokens is None else add_special_tokens and tokenizer.add_bos
        if wanted and tokenizer.bos_id is not None and ids[:1] != [tokenizer.bos_id]:
            return [tokenizer.bos_id, *ids]
        return ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        from miaotui.model.chat import ChatTemplate

        template = ChatTemplate.from_checkpoint(self._opened.checkpoint, self._opened.tokenizer)
        return template.render(chat_history, add_generation_prompt=add_generation_prompt)

    # -- answers -----------------------------------------------------------------------------------------
    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Σ log p of each continuation, and whether it is what the model would say."""
        scorer = self._scoring()
        order = sorted(range(len(requests)), key=lambda i: requests[i][1])  # a context's choices stand together
        found: dict[int, tuple[float, bool]] = {}
        with Rows(self._settings.threads) as rows:
            for done, i in enumerate(order, 1):
                _, context, continuation = requests[i]
                found[i] = self._score(rows, scorer, context, continuation)
                self._tell(done, len(requests))
        return [found[i] for i in range(len(requests))]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Σ log p of whole texts, in windows that do not overlap."""
        totals = []
        for request in requests:
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            windows = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length - 1, 1)
            pairs = [(None, *make_disjoint_window(window)) for window in windows]
            totals.append(sum(score for score, _ in self._loglikelihood_tokens(pairs)))
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Free answers, all at once."""
        from miaotui.engine.params import SamplingParams

        llm = self._generating()
        prompts, params = [], []
        for request in requests:
            context, wanted = request.args
            new = int(wanted.get("max_gen_toks", NEW_TOKENS))
            until = wanted.get("until") or []
            stop = [text for text in ([until] if isinstance(until, str) else until) if text]
            heat = float(wanted.get("temperature", 0.0)) if wanted.get("do_sample") else 0.0
            prompts.append({"prompt_token_ids": self.tok_encode(context)[-(self.max_length - new) :]})
            params.append(SamplingParams(temperature=heat, max_tokens=new, stop=stop or None, seed=0))
        return [output.outputs[0].text for output in llm.generate(prompts, params)]

    def close(self) -> None:
        """Free the model."""
        if self._scorer is not None:
            self._scorer.close()
        if self._llm is not None:
            self._llm.close()
        self._scorer = self._llm = None

    # -- inside ------------------------------------------------------------------------------------------
    def _scoring(self) -> Scorer:
        if self._scorer is None:
            self.close()
            self._scorer = self._opened.load(self._settings, self.max_length, 1)
        return self._scorer

    def _generating(self) -> Any:
        if self._llm is None:
            from miaotui.engine.llm import LLM

            self.close()
            s = self._settings
            options: dict[str, Any] = {"compute": s.compute, "kv_cache_dtype": s.kv_cache_dtype, "threads": s.threads}
            self._llm = LLM(self._opened.model, device=s.device, max_model_len=self.max_length, **options)  # type: ignore[arg-type]
        return self._llm

    def _score(self, rows: Rows, scorer: Scorer, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        whole = np.array([*context, *continuation], np.int32)[-self.max_length :]
        window = Window(whole, max(1, len(whole) - len(continuation)))
        said = Listening(scorer)
        nll = rows.nll(said, window)
        return -float(nll.sum()), bool(np.array_equal(said.likeliest, window.targets))


def harness(
    lm: EngineLM, tasks: Sequence[str], *, limit: int | None, folder: str | None, shots: int | None, chat: bool
) -> Mapping[str, Any]:
    """What the harness reports of these tasks, every sample with it. Raises what it raises."""
    from lm_eval import evaluator
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    found = evaluator.simple_evaluate(
        lm,
        tasks=list(tasks),
        num_fewshot=shots,
        limit=limit,
        bootstrap_iters=0,
        apply_chat_template=chat,
        task_manager=TaskManager(include_path=folder),
    )
    assert found is not None
    result: Mapping[str, Any] = found
    return result
