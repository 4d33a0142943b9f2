"""What an artefact recommends is followed where the flags say nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from miaotui.checkpoint import serving
from miaotui.cli.load import as_served
from miaotui.cli.options import engine_options, take_engine
from miaotui.hardware.detect import usable_cores


@pytest.fixture
def artefact(tmp_path: Path) -> str:
    options = {"kv_cache_dtype": "int8", "speculative": "ngram", "max_num_seqs": 8, "threads": 1}
    serving.write(tmp_path, options, usable_cores())
    return str(tmp_path)


def asked(artefact: str, *flags: str) -> dict[str, Any]:
    """What LLM would get for these flags."""
    found: list[dict[str, Any]] = []

    @click.command()
    @engine_options
    def command(**options: Any) -> None:
        found.append(as_served(artefact, take_engine(options)))

    result = CliRunner().invoke(command, flags)
    assert result.exit_code == 0, result.output
    return found[0]


def test_what_is_recommended(artefact: str) -> None:
    assert asked(artefact) == {"kv_cache_dtype": "int8", "speculative": "ngram", "max_num_seqs": 8, "threads": 1}


def test_flags_go_before(artefact: str) -> None:
    """Also where they say what is the default without an artefact."""
    flags = ["--kv-cache-dtype", "auto", "--speculative", "none", "--threads", "2", "--device", "cpu"]
    assert asked(artefact, *flags) == {"kv_cache_dtype": "auto", "max_num_seqs": 8, "threads": 2, "device": "cpu"}


def test_a_model_without_recommendations(tmp_path: Path) -> None:
    assert asked(str(tmp_path)) == asked("demo") == {}
    assert asked("demo", "--compute", "fp32") == {"compute": "fp32"}
