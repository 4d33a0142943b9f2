"""The profile: every op of a step, its share, and what is left for the host."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from miaotui.errors import UsageError
from miaotui.hardware.ceilings import Probes
from miaotui.measure import profile
from miaotui.measure.speed import Settings

PROBES = Probes(lambda *_: [50.0], lambda *_: 2.0, lambda *_: 0.5)


def test_ops_and_host_make_up_the_step(demo_gguf: Path) -> None:
    options = {"max_model_len": 704, "max_num_seqs": 2}
    report = profile.run(Settings(str(demo_gguf), options, []), PROBES)
    names = [case["case"] for case in report["cases"]]
    assert names == ["decode-1@16", "decode-1@512", "prefill-512"]  # 64 sequences do not fit
    for case in report["cases"]:
        lines = {line["op"]: line for line in case["lines"]}
        assert lines["attention"]["count"] == 30
        assert sum(line["count"] for op, line in lines.items() if op.startswith("linear")) == 30 * 4 + 1
        assert sum(line["seconds"] for line in case["lines"]) == pytest.approx(case["seconds"], rel=1e-6)
        if case["case"].startswith("decode"):
            assert sum(line["least"] for line in case["lines"]) == pytest.approx(96.4e6 / 50e9, rel=0.3)
    json.dumps(report)


def test_only_the_cpu_backend_is_profiled(demo_gguf: Path) -> None:
    pytest.importorskip("torch", reason="the other backend runs on PyTorch")
    options = {"device": "reference", "max_model_len": 64, "max_num_seqs": 1, "max_num_batched_tokens": 64}
    with pytest.raises(UsageError, match="CPU backend"):
        profile.run(Settings(str(demo_gguf), options, []), PROBES)
