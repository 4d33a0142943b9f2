"""`miaotui bench` from outside: a dummy model, measured in earnest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.test_main import spawn

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}


@pytest.fixture
def config(tmp_path: Path) -> str:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(TINY))
    return str(file)


def test_dummy_weights(config: str) -> None:
    flags = ["--quantization", "w4g32-sym", "--regimes", "start,peak-memory,prefill-512,decode-1@16", "--repeat", "1"]
    done = spawn("bench", "--dummy-weights", config, *flags, "--json", "--threads", "1")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["model"]["weights"] == "dummy"
    assert report["model"]["layers"] == 2
    assert [result["regime"] for result in report["results"]] == flags[3].split(",")
    assert all(result["median"] > 0 for result in report["results"])


def test_what_dummy_weights_refuse(config: str) -> None:
    for arguments, status in (
        (["demo", "--quantization", "q4_0"], 2),
        ([config, "--dummy-weights", "--quantization", "w3g3"], 2),
        ([config, "--dummy-weights", "--layers", "3"], 2),
        ([config + ".nowhere", "--dummy-weights"], 1),
    ):
        done = spawn("bench", *arguments)
        assert (done.returncode, done.stdout) == (status, ""), done.stderr
        assert "Traceback" not in done.stderr
