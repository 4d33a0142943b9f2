"""`miaotui doctor NAME` of a hub model that is not here: judged by its config.json, nothing else fetched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from miaotui.measure.fit import weight_bytes_of
from miaotui.model.families import spec_of_config
from tests.checkpoint.test_hub import Hub, hub
from tests.cli.test_bench import TINY
from tests.cli.test_main import SOURCE

__all__ = ["hub"]


def doctor(model: str, url: str, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    settings = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-m", "miaotui.cli.main", "doctor", model, "--json"]
    environment = {**kept, "PYTHONPATH": SOURCE, **settings, **environment}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)


def judged(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    model: dict[str, Any] = json.loads(done.stdout)["model"]
    return model


def test_only_the_configuration_is_fetched(hub: Hub, tmp_path: Path) -> None:
    home = tmp_path / "hf"
    (hub.folder / "config.json").write_text(json.dumps(TINY))
    model = judged(doctor("tiny/model", hub.url, home))
    assert hub.fetched == ["config.json"]
    assert model["weight_bytes"] == (hub.folder / "model.safetensors").stat().st_size
    assert (model["family"], model["format"], model["size_from"]) == ("llama", "safetensors", "hub")
    model = judged(doctor("tiny/model", "http://127.0.0.1:9", home))  # out of reach, but its configuration is here
    assert model["size_from"] == "estimate"
    assert model["weight_bytes"] == 2 * model["parameters"]
    done = doctor("tiny/other", "http://127.0.0.1:9", home)
    assert (done.returncode, done.stdout) == (1, "")
    assert "error: tiny/other is not in the hub's cache, and the hub cannot be reached." in done.stderr


def test_what_cannot_be_judged(hub: Hub, tmp_path: Path) -> None:
    (hub.folder / "config.json").write_text(json.dumps({"architectures": ["BertModel"]}))
    done = doctor("tiny/model", hub.url, tmp_path / "hf")
    assert (done.returncode, done.stdout) == (1, "")
    assert "'BertModel' is not supported" in done.stderr
    (hub.folder / "config.json").unlink()
    assert "has no config.json" in doctor("tiny/model", hub.url, tmp_path / "hf").stderr
    assert hub.fetched == ["config.json"]


@pytest.mark.parametrize(
    ("more", "bytes_each"),
    [
        ({}, 2),
        ({"torch_dtype": "float32"}, 4),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, 4.25 / 8),
        ({"quantization_config": {"config_groups": {"group_0": {"weights": {"num_bits": 8}}}}}, 8.25 / 8),
    ],
)
def test_an_estimate_of_the_weights(more: dict[str, Any], bytes_each: float) -> None:
    config = {**TINY, **more}
    spec = spec_of_config(config)
    tables = 2 * 300 * 64
    layers = 2 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 96)
    expected = layers * bytes_each + tables * max(2, bytes_each)
    assert weight_bytes_of(spec, config) == pytest.approx(expected)


def test_kernels_that_do_not_run_here_are_told() -> None:
    kept = {key: value for key, value in os.environ.items() if key != "MIAOTUI_ISA"}
    for named, told in (("avx1024", True), ("portable", False)):
        command = [sys.executable, "-m", "miaotui.cli.main", "doctor", "--json"]
        environment = {**kept, "PYTHONPATH": SOURCE, "MIAOTUI_ISA": named}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=True)
        lacks = {lack["what"]: lack["command"] for lack in json.loads(done.stdout)["missing"]}
        assert (lacks.get("kernels 'avx1024', which MIAOTUI_ISA names") == "unset MIAOTUI_ISA") is told
