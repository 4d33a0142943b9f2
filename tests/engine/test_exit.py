"""The end of an LLM: closed twice, used afterwards, forgotten, or overtaken by the end of the process."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest

from miaotui import LLM
from miaotui.errors import UsageError
from tests.engine.test_llm import GREEDY, toy_model

__all__ = ["toy_model"]

BEGIN = """
import threading, time
from miaotui import LLM, SamplingParams
llm = LLM("demo", threads=1, max_model_len=256)
"""
FORGOTTEN = "print(llm.generate('Hi', SamplingParams(max_tokens=2))[0].outputs[0].text)"
IN_A_CYCLE = "llm.itself = llm; import json; json.kept = llm; stream = llm.stream('Hi'); next(stream)"
IN_A_THREAD = """
def talk():
    for output in llm.stream("Hi", SamplingParams(max_tokens=200, ignore_eos=True)):
        started.set()
started = threading.Event()
threading.Thread(target=talk, daemon=True).start()
started.wait()
"""


@pytest.mark.parametrize("code", [FORGOTTEN, IN_A_CYCLE, IN_A_THREAD], ids=["forgotten", "cycle", "thread"])
def test_a_process_that_closes_nothing_ends_quietly(code: str, demo_gguf: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + code], capture_output=True, text=True, env=environment, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


FORKED = """
import os, sys
from miaotui import LLM
llm = LLM("demo", threads=2, max_model_len=256)
child = os.fork()
if child == 0:
    sys.exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_child_ends_without_the_threads_it_lacks(demo_gguf: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    command = [sys.executable, "-W", "ignore", "-c", FORKED]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "7\n", "")


def test_closed_twice_and_used_afterwards(toy_model: None) -> None:
    llm = LLM("toy", max_num_seqs=4, max_num_batched_tokens=64)
    stream = llm.stream("hello", GREEDY)
    next(stream)
    llm.close()
    llm.close()
    for use in (lambda: next(stream), lambda: llm.generate("hello", GREEDY)):
        with pytest.raises(UsageError, match="closed"):
            use()
    stream.close()


def test_a_dropped_one_closes_itself(toy_model: None) -> None:
    llm = LLM("toy", max_num_seqs=4, max_num_batched_tokens=64)
    executor = llm.engine.executor
    llm.generate("hello", GREEDY)
    del llm
    gc.collect()
    assert executor.closed  # type: ignore[attr-defined]
