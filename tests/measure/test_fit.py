from __future__ import annotations

import pytest

from miaotui.hardware.ceilings import Ceilings
from miaotui.measure.fit import HEADROOM, ceilings_of, fit
from miaotui.measure.work import parameters, parameters_read
from miaotui.model.spec import ExpertsSpec
from tests.measure.test_work import make_spec

LIMITS = Ceilings(threads=2, working_set=1, bandwidth=1e9, int8=1e12, fp32=1e11)


def test_what_fits() -> None:
    spec = make_spec()
    per_token = 2 * 2 * 2 * 8 * 2
    found = fit(spec, 1_000_000, 1_000_000 + HEADROOM + 300 * per_token)
    assert (found.cache_bytes_per_token, found.context, found.fits) == (per_token, 300, True)
    assert fit(spec, 1_000_000, 1_000_000 + HEADROOM + 200 * per_token).fits is False
    assert fit(spec, 1_000_000, 500_000).context == 0
    assert fit(spec, 1_000_000, 1 << 40).context == spec.max_position


def test_bytes_of_a_step() -> None:
    spec = make_spec()
    assert parameters(spec) - parameters_read(spec) == spec.vocab_size * spec.hidden_size
    assert fit(spec, parameters(spec), 1 << 40).step_bytes == parameters_read(spec)
    routed = make_spec(experts=ExpertsSpec(count=8, top_k=2, width=16, normalise=True))
    idle = 2 * 6 * 3 * 32 * 16 + routed.vocab_size * routed.hidden_size
    assert parameters(routed) - parameters_read(routed) == idle


def test_ceilings_of_a_model_whose_reading_limits() -> None:
    spec = make_spec()
    found = fit(spec, 4 * parameters(spec), 1 << 40)
    possible = ceilings_of(spec, found, LIMITS)
    assert set(possible) == {"decode-1@16", "decode-1@512", "prefill-512"}
    assert possible["decode-1@16"] == pytest.approx(1e9 / (found.step_bytes + 15 * found.cache_bytes_per_token))
    assert possible["decode-1@512"] < possible["decode-1@16"] < possible["prefill-512"]
