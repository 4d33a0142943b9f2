"""Which kernels run: the best, or what MIAOTUI_ISA names. Read once a process, so each case has its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from miaotui.backends.cpu import _native

LOOK = """
import json, sys
from miaotui import LLM, SamplingParams
from miaotui.backends.cpu import _native
from miaotui.errors import UsageError
from miaotui.hardware.detect import detect
found = {"isas": _native.isas(), "level": detect().isa_level}
try:
    llm = LLM(sys.argv[1], max_model_len=64)
    params = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
    found["tokens"] = list(llm.generate(["one two"], params)[0].outputs[0].token_ids)
except UsageError as error:
    found["refused"] = f"{error} {error.hint}"
print(json.dumps(found))
"""


def look(model: Path, isa: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", LOOK, str(model)],
        env={**os.environ, "MIAOTUI_ISA": isa},
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("isa", _native.isas())
def test_the_kernels_named_run(demo_gguf: Path, isa: str) -> None:
    found = look(demo_gguf, isa)
    isas = _native.isas()
    assert found["isas"] == isas[isas.index(isa) :]
    assert found["level"] == isa
    assert len(found["tokens"]) == 6


def test_kernels_that_do_not_run_are_refused(demo_gguf: Path) -> None:
    found = look(demo_gguf, "avx1024")
    assert found["isas"] == _native.isas()
    assert "'avx1024', and this processor has no such kernels. Set it to one of" in found["refused"]
    assert "tokens" not in found
