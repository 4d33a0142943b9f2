"""Training of a layer's codes: never worse, honest about what it left, gradients as the paper has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch

from miaotui.compress.methods.gptq import gptq
from miaotui.compress.methods.qat import QatOptions, Start, Tuned, _Learned, tune
from miaotui.compress.methods.rtn import rtn
from miaotui.errors import UsageError
from miaotui.quant.scheme import QuantScheme
from tests.compress.methods import problems

WIDTH, INNER = 32, 64
SCHEME = QuantScheme(3, 16, True, "bfloat16")
QUICK = QatOptions(steps=30, batch=4, rate=0.03, scale_rate=0.005, norm_rate=0.005)


def run(values: Mapping[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """A small gated layer with a norm and a residual."""
    y = torch.nn.functional.rms_norm(x, (WIDTH,), values["norm"], 1e-5)
    return x + (torch.nn.functional.silu(y @ values["gate"].T) * (y @ values["up"].T)) @ values["down"].T


def layer() -> dict[str, torch.Tensor]:
    return {
        "gate": problems.weight(INNER, WIDTH, 3) * 3,
        "up": problems.weight(INNER, WIDTH, 4) * 3,
        "down": problems.weight(WIDTH, INNER, 5) * 3,
    }


def data() -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    x = problems.inputs(24 * 16, WIDTH).view(24, 16, WIDTH)
    norms = {"norm": torch.rand(WIDTH, generator=torch.Generator().manual_seed(0)) + 0.5}
    return x, run(layer() | norms, x), norms


def tuned(scheme: QuantScheme = SCHEME, options: QatOptions = QUICK, seed: int = 0) -> tuple[Tuned, dict[str, Start]]:
    x, target, norms = data()
    starts = {name: Start.of(w, rtn(w, scheme, minimum=_minimum(scheme)).tensor, scheme) for name, w in layer().items()}
    return tune(starts, norms, x, target, run, options, seed=seed), starts


def _minimum(scheme: QuantScheme) -> str:
    return "free" if scheme.group_size == 8 else "zero_point"


def slow_loss(values: Mapping[str, torch.Tensor], windows: list[int]) -> float:
    """Mean over the tokens of these windows of the squared error relative to the target's square, in float64."""
    x, target, _ = data()
    made = run({name: v.double() for name, v in values.items()}, x[windows].double())
    wrong, whole = (made - target[windows]).square().sum(-1), target[windows].double().square().sum(-1)
    return float((wrong / whole).mean())


@pytest.mark.parametrize(
    "scheme",
    [
        SCHEME,
        QuantScheme(2, 16, False, "float16"),
        QuantScheme(3, 8, False, "float16"),
        replace(SCHEME, group_size=None),
    ],
    ids=["sym", "zero", "free", "channel"],
)
def test_the_held_out_loss_falls_and_is_that_of_the_codes(scheme: QuantScheme) -> None:
    made, starts = tuned(scheme)
    _, _, norms = data()
    held = [7, 15, 23]
    before = {name: s.grid.values(s.codes) for name, s in starts.items()} | norms
    after = {name: torch.from_numpy(q.tensor.dense32()) for name, q in made.weights.items()} | made.norms
    assert made.before == pytest.approx(slow_loss(before, held), rel=1e-4)
    assert made.after == pytest.approx(slow_loss(after, held), rel=1e-4)
    assert made.after < 0.8 * made.before
    for name, q in made.weights.items():
        torch.testing.assert_close(q.values, after[name], rtol=0, atol=0)
        assert q.tensor.codes.max() < 1 << scheme.bits
        assert (q.tensor.codes != starts[name].codes.numpy()).any()
        kept = torch.from_numpy(q.tensor.scale).to(getattr(torch, scheme.scale_type)).float()
        np.testing.assert_array_equal(kept.numpy(), q.tensor.scale)
        error = problems.relative_error(starts[name].weight, q.values, torch.eye(q.values.shape[1]))
        assert q.error == pytest.approx(error, rel=1e-4)


def test_scales_norms_and_codes_each_help() -> None:
    whole, _ = tuned()
    for name in ("rate", "scale_rate", "norm_rate"):
        alone = replace(QatOptions(30, 4, 0.0, 0.0, 0.0), **{name: getattr(QUICK, name)})
        part, starts = tuned(options=alone)
        assert whole.after < part.after < part.before
        same = all(
            torch.equal(torch.from_numpy(part.weights[n].tensor.codes).float(), s.codes) for n, s in starts.items()
        )
        assert same == (name != "rate")


def test_the_same_seed_gives_the_same_bits() -> None:
    first, again, other = tuned()[0], tuned()[0], tuned(seed=1)[0]
    assert first.after == again.after != other.after
    np.testing.assert_array_equal(first.weights["up"].tensor.codes, again.weights["up"].tensor.codes)
    assert torch.equal(first.norms["norm"], again.norms["norm"])


def test_training_that_harms_is_given_up() -> None:
    made, starts = tuned(options=QatOptions(4, 2, rate=3.0, scale_rate=2.0, norm_rate=2.0))
    assert made.after == made.before
    for name, start in starts.items():
        np.testing.assert_array_equal(made.weights[name].tensor.codes, start.codes.to(torch.uint8).numpy())
        np.testing.assert_array_equal(made.weights[name].tensor.scale, start.grid.scale.numpy())
    assert torch.equal(made.norms["norm"], data()[2]["norm"])


def test_a_start_from_float32_scales_is_kept_to_the_bit() -> None:
    scheme = replace(SCHEME, scale_type="float32")
    weight = layer()["up"]
    found = rtn(weight, scheme)
    learned = _Learned(Start.of(weight, found.tensor, scheme), 0.45)
    assert torch.equal(learned.values().detach(), found.values)


@pytest.mark.parametrize("symmetric", [True, False])
def test_gradients_pass_straight_through_within_range_only(symmetric: bool) -> None:
    scheme = replace(SCHEME, symmetric=symmetric)
    weight = layer()["up"]
    start = Start.of(weight, rtn(weight, scheme).tensor, scheme)
    learned = _Learned(start, 0.45)
    with torch.no_grad():
        learned.u[0, 0, :2] = torch.tensor([-3.0, 40.0])
    pull = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    (learned.values() * pull).sum().backward()
    by_group, scale = pull.view(INNER, -1, 16), start.grid.scale[..., None]
    want = by_group * scale
    want[0, 0, :2] = 0
    torch.testing.assert_close(learned.u.grad, want)
    assert start.grid.zero is not None
    whole = learned.u.detach().round().clamp(0, 7) - start.grid.zero[..., None]
    torch.testing.assert_close(learned.ratio.grad, (by_group * whole * scale).sum(2))  # of a logarithm: times the scale


def test_it_starts_at_the_rounder_s_codes_as_near_the_weight_as_it_may() -> None:
    weight = layer()["down"]
    found = gptq(weight, SCHEME, problems.moment(problems.inputs(300, INNER)))
    start = Start.of(weight, found.tensor, SCHEME)
    learned = _Learned(start, 0.45)
    torch.testing.assert_close(learned.values().detach(), found.values)
    distance = (learned.u.detach().flatten(1) - start.codes).abs()
    assert float(distance.max()) <= 0.45 + 1e-6
    exact = (weight.view(WIDTH, -1, 16) / start.grid.scale[..., None] + 4).flatten(1)
    near = (exact - start.codes).abs() < 0.45
    assert 0.3 < float(near.float().mean()) < 1
    torch.testing.assert_close(learned.u.detach().flatten(1)[near], exact[near])


def test_one_window_is_enough_and_settings_are_checked() -> None:
    x, target, norms = data()
    starts = {name: Start.of(w, rtn(w, SCHEME).tensor, SCHEME) for name, w in layer().items()}
    made = tune(starts, norms, x[:1], target[:1], run, QUICK)
    assert made.after < made.before
    for wrong in ({"steps": 0}, {"batch": 0}, {"rate": -1.0}, {"near": 0.5}):
        with pytest.raises(UsageError):
            QatOptions(**wrong)


def test_targets_that_are_not_finite_change_nothing() -> None:
    x, target, norms = data()
    target = target.clone()
    target[0, 0, 0] = float("nan")
    target[7, 3, 1] = float("inf")
    starts = {name: Start.of(w, rtn(w, SCHEME).tensor, SCHEME) for name, w in layer().items()}
    made = tune(starts, norms, x, target, run, QUICK)
    for name, start in starts.items():
        np.testing.assert_array_equal(made.weights[name].tensor.codes, start.codes.to(torch.uint8).numpy())
