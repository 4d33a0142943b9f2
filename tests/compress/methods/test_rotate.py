"""Rotations: orthogonal, spread out, and folded so that a layer with its norms answers the same."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from miaotui.compress.methods import rotate as r
from miaotui.compress.methods.gptq import gptq
from miaotui.quant.scheme import QuantScheme
from tests.compress.methods import problems

HIDDEN, HEADS, KV_HEADS, HEAD, INNER, TOKENS = 48, 4, 2, 8, 40, 9


@pytest.mark.parametrize("size", [1, 2, 8, 9, 48, 64, 576, 960])
def test_rotations_are_orthogonal_and_spread_every_channel(size: int) -> None:
    made = r.rotation(size)
    torch.testing.assert_close(made @ made.T, torch.eye(size), atol=2e-5, rtol=0)
    power = size & -size
    bound = (1 if power == size else 2**0.5) / size**0.5  # cosines reach √2 of the mean magnitude
    assert float(made.abs().max()) <= bound + 1e-6
    assert size < 8 or not torch.equal(made, r.rotation(size, 1))
    assert torch.equal(made, r.rotation(size))


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    shapes = {
        "q": (HEADS * HEAD, HIDDEN), "k": (KV_HEADS * HEAD, HIDDEN), "v": (KV_HEADS * HEAD, HIDDEN),
        "o": (HIDDEN, HEADS * HEAD), "gate": (INNER, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER),
    }  # fmt: skip
    made = {name: problems.weight(*shape, seed + i) * 4 for i, (name, shape) in enumerate(shapes.items())}
    g = torch.Generator().manual_seed(seed)
    made |= {name: torch.rand(HIDDEN, generator=g) + 0.5 for name in ("norm", "mlp_norm", "last_norm")}
    made["table"] = torch.randn(30, HIDDEN, generator=g)
    return made


def answer(w: dict[str, torch.Tensor], head: torch.Tensor, seen: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
    """Logits of a model of one layer, from its parts; `seen` is given what goes into some linears."""
    seen = {} if seen is None else seen
    h = w["table"][torch.arange(TOKENS) * 3]
    seen["q"] = x = F.rms_norm(h, (HIDDEN,), w["norm"], 1e-5)
    q, k, v = ((x @ w[name].T).view(TOKENS, -1, HEAD).transpose(0, 1) for name in "qkv")
    k, v = (t.repeat_interleave(HEADS // KV_HEADS, dim=0) for t in (k, v))
    seen["o"] = mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1).reshape(TOKENS, -1)
    h = h + mixed @ w["o"].T
    seen["gate"] = x = F.rms_norm(h, (HIDDEN,), w["mlp_norm"], 1e-5)
    h = h + (F.silu(x @ w["gate"].T) * (x @ w["up"].T)) @ w["down"].T
    return F.rms_norm(h, (HIDDEN,), w["last_norm"], 1e-5) @ head.T


def rotated(w: dict[str, torch.Tensor], turn: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The same model with R1 folded in, and its head, no longer tied."""
    made = dict(w)
    for names, norm in ((("q", "k", "v"), "norm"), (("gate", "up"), "mlp_norm")):
        for name in names:
            made[name] = r.rotate_reader(r.absorb_norm(w[name], w[norm]), turn)
    made |= {name: r.rotate_writer(w[name], turn) for name in ("o", "down")}
    made |= {name: torch.ones(HIDDEN) for name in ("norm", "mlp_norm", "last_norm")}
    head = r.rotate_reader(r.absorb_norm(w["table"], w["last_norm"]), turn)
    made["table"] = r.rotate_reader(w["table"], turn)
    return made, head


def test_the_stream_can_be_rotated() -> None:
    w = weights()
    made, head = rotated(w, r.rotation(HIDDEN))
    torch.testing.assert_close(answer(made, head), answer(w, w["table"]), atol=2e-4, rtol=1e-4)
    assert not torch.allclose(made["q"], w["q"])


def test_values_can_be_rotated_head_by_head() -> None:
    w, turn = weights(), r.rotation(HEAD, 3)
    made = w | {"v": r.rotate_values(w["v"], turn), "o": r.rotate_output(w["o"], turn)}
    torch.testing.assert_close(answer(made, w["table"]), answer(w, w["table"]), atol=2e-4, rtol=1e-4)
    bias = torch.randn(KV_HEADS * HEAD)
    by_head = torch.stack([bias.view(-1, HEAD)[k] @ turn for k in range(KV_HEADS)]).flatten()
    torch.testing.assert_close(r.rotate_values(bias, turn), by_head)


def test_moments_turn_with_the_inputs() -> None:
    w, turn, small = weights(), r.rotation(HIDDEN), r.rotation(HEAD, 3)
    before: dict[str, torch.Tensor] = {}
    after: dict[str, torch.Tensor] = {}
    answer(w, w["table"], before)
    made, head = rotated(w, turn)
    made |= {"v": r.rotate_values(made["v"], small), "o": r.rotate_output(made["o"], small)}
    answer(made, head, after)
    for name, norm in (("q", "norm"), ("gate", "mlp_norm")):
        got = r.rotate_moment(before[name].T @ before[name], turn, w[norm])
        torch.testing.assert_close(got, after[name].T @ after[name], atol=1e-3, rtol=1e-3)
    got = r.rotate_output_moment(before["o"].T @ before["o"], small)
    torch.testing.assert_close(got, after["o"].T @ after["o"], atol=1e-3, rtol=1e-3)


def test_a_channel_that_the_norm_shuts_stays_shut() -> None:
    moment, norm = problems.moment(problems.inputs(40, 16)), torch.ones(16)
    norm[3] = 0
    made = r.rotate_moment(moment, torch.eye(16), norm)
    assert bool(torch.isfinite(made).all())
    assert bool((made[3] == 0).all())


def test_outliers_cost_less_once_rotated() -> None:
    scheme, turn = QuantScheme(3, None, True), r.rotation(64)
    weight, x = problems.weight(32, 64), problems.inputs(300, 64)
    weight[:, 9] *= 15
    plain = gptq(weight, scheme, problems.moment(x)).error
    assert gptq(r.rotate_reader(weight, turn), scheme, r.rotate_moment(problems.moment(x), turn)).error < 0.7 * plain
