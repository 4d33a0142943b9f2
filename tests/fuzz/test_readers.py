"""The readers against damaged files: small valid ones, mutated, opened and read through.

Whatever the bytes, the outcome is a model or one of our typed errors: never another exception, never more than a few
megabytes, never more than a moment. Runs INPUTS inputs for each kind of file; MIAOTUI_FUZZ=20000 runs so many.
"""

from __future__ import annotations

import json
import os
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from miaotui.checkpoint import open_checkpoint
from miaotui.errors import MiaotuiError
from miaotui.quant import pack
from miaotui.quant.rounding import round_to_nearest
from miaotui.quant.scheme import QuantScheme
from miaotui.quant.tensor import DenseTensor
from tests.checkpoint.making import random, write_folder, write_tiny_gguf

INPUTS = int(os.environ.get("MIAOTUI_FUZZ", "400"))
MOST_BYTES = 8 << 20
MOST_SECONDS = 5.0

fuzzed = settings(
    max_examples=INPUTS, deadline=None, database=None, phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


def survive(path: Path) -> bool:
    """Open the model and read every tensor of sensible size; True when nothing was wrong with it."""
    tracemalloc.start()
    start = time.monotonic()
    try:
        checkpoint = open_checkpoint(path)
        for name in checkpoint.names():
            tensor = checkpoint.tensor(name)
            assert tensor.shape is not None
            if np.prod(tensor.shape, dtype=object) <= 1 << 16:
                assert tensor.dense32().shape == tensor.shape
        checkpoint.fingerprint()
        checkpoint.asset("tokenizer.json")
        return True
    except MiaotuiError as error:
        if not (error.message and error.hint):
            pytest.fail(f"{error!r} says too little")
        return False
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < MOST_BYTES, f"{peak} bytes"
        assert time.monotonic() - start < MOST_SECONDS


# -- bytes ---------------------------------------------------------------------------------------------------
NUMBERS = st.sampled_from(
    [0, 1, 2, 3, 7, 8, 9, 31, 32, 33, 255, 256, 1 << 16, 1 << 24, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 40,
     1 << 48, 1 << 61, (1 << 63) - 1, 1 << 63, (1 << 64) - 32, (1 << 64) - 1]
)  # fmt: skip


@st.composite
def mutations(draw: st.DrawFn, size: int) -> Callable[[bytes], bytes]:
    """One to four edits of a file of about `size` bytes."""
    edits: list[tuple[str, int, Any]] = []
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["byte", "u32", "u64", "cut", "insert", "delete", "copy"]))
        place = draw(st.integers(0, size - 1))
        if kind == "byte":
            edits.append((kind, place, draw(st.integers(0, 255))))
        elif kind in ("u32", "u64"):
            edits.append((kind, place, draw(NUMBERS)))
        elif kind == "insert":
            edits.append((kind, place, draw(st.binary(min_size=1, max_size=16))))
        else:
            edits.append((kind, place, draw(st.integers(1, 64))))

    def apply(data: bytes) -> bytes:
        for kind, place, value in edits:
            data = _edit(data, kind, place, value)
        return data

    return apply


def _edit(data: bytes, kind: str, place: int, value: Any) -> bytes:
    before, after = data[:place], data[place:]
    if kind == "byte":
        return before + bytes([value]) + after[1:]
    if kind == "u32":
        return before + struct.pack("<I", value & 0xFFFFFFFF) + after[4:]
    if kind == "u64":
        return before + struct.pack("<Q", value) + after[8:]
    if kind == "cut":
        return before
    if kind == "insert":
        return before + value + after
    if kind == "delete":
        return before + after[value:]
    return before + after[:value] + after


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def header_end(path: Path) -> int:
    """Most edits should fall into the header, where they can do harm."""
    return min(1500, path.stat().st_size)


@fuzzed
@given(data=st.data())
def test_gguf_bytes(gguf_file: Path, data: st.DataObject) -> None:
    whole = _original(gguf_file)
    mutate = data.draw(mutations(header_end(gguf_file)))
    target = gguf_file.with_name("mutated.gguf")
    target.write_bytes(mutate(whole))
    survive(target)


_ORIGINALS: dict[Path, bytes] = {}


def _original(path: Path) -> bytes:
    if path not in _ORIGINALS:
        _ORIGINALS[path] = path.read_bytes()
    return _ORIGINALS[path]


@pytest.fixture(scope="module")
def dense_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = {"a": random((3, 4)), "b": random((5,)).astype(np.float16), "c": ("BF16", np.arange(6, dtype=np.uint16))}
    return write_folder(tmp_path_factory.mktemp("dense"), tensors)


@fuzzed
@given(data=st.data())
def test_safetensors_bytes(dense_folder: Path, data: st.DataObject) -> None:
    path = dense_folder / "model.safetensors"
    whole = _original(path)
    mutate = data.draw(mutations(len(whole)))
    path.write_bytes(mutate(whole))
    survive(dense_folder)


# -- JSON ----------------------------------------------------------------------------------------------------
JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 70), NUMBERS, st.floats(), st.text(max_size=8),
    st.sampled_from(["F32", "F16", "I32", "I8", "U8", "F4", "F8_E4M3", "../x", "/etc/passwd"]),
    st.sampled_from(["a.safetensors", "gptq", "awq", "gptq_v2", "dense", "int-quantized"]),
    st.lists(st.one_of(NUMBERS, st.integers(-2, 70), st.text(max_size=3)), max_size=4),
    st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "a", "format"]), st.integers(0, 99), max_size=3),
)  # fmt: skip


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside a JSON value."""
    inside = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    return [path, *(place for key, item in inside for place in _places(item, (*path, key)))]


@st.composite
def changed(draw: st.DrawFn, original: Any) -> Any:
    """The JSON value with one to three of its parts replaced, removed or renamed."""
    value = json.loads(json.dumps(original))
    for _ in range(draw(st.integers(1, 3))):
        places = [place for place in _places(value) if place]
        if not places:
            break
        *way, last = draw(st.sampled_from(places))
        holder = value
        for key in way:
            holder = holder[key]
        action = draw(st.sampled_from(["replace", "replace", "remove", "rename"]))
        if action == "replace":
            holder[last] = draw(JUNK)
        elif action == "remove":
            del holder[last]
        elif isinstance(holder, dict):
            holder[draw(st.text(max_size=6))] = holder.pop(last)
    return value


def _rewrite(whole: bytes, header: Any) -> bytes:
    """A safetensors file with another header and the same data."""
    length = int.from_bytes(whole[:8], "little")
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + whole[8 + length :]


def _header(whole: bytes) -> Any:
    return json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])


@fuzzed
@given(data=st.data())
def test_safetensors_headers(dense_folder: Path, data: st.DataObject) -> None:
    path = dense_folder / "model.safetensors"
    whole = _original(path)
    path.write_bytes(_rewrite(whole, data.draw(changed(_header(whole)))))
    survive(dense_folder)


@pytest.fixture(scope="module")
def sharded_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_folder(tmp_path_factory.mktemp("sharded"), {"x": random((2, 2)), "y": random((3,))})
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    return folder


@fuzzed
@given(data=st.data())
def test_indexes(sharded_folder: Path, data: st.DataObject) -> None:
    index = {"metadata": {"total_size": 28}, "weight_map": {"x": "a.safetensors", "y": "a.safetensors"}}
    changed_index = data.draw(changed(index))
    (sharded_folder / "model.safetensors.index.json").write_text(json.dumps(changed_index))
    survive(sharded_folder)


def _gptq() -> tuple[dict[str, Any], dict[str, Any]]:
    rng = np.random.default_rng(0)
    codes, zeros = rng.integers(0, 16, (16, 64), dtype=np.uint8), rng.integers(0, 16, (2, 16), dtype=np.uint8)
    tensors = {
        "m.qweight": np.ascontiguousarray(pack.pack_words(codes, 4).T),
        "m.qzeros": pack.pack_words(zeros, 4),
        "m.scales": rng.random((2, 16), np.float32).astype(np.float16),
        "m.g_idx": np.repeat(np.arange(2, dtype=np.int32), 32)[rng.permutation(64)],
    }
    return tensors, {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq"}


def _awq() -> tuple[dict[str, Any], dict[str, Any]]:
    rng = np.random.default_rng(0)
    tensors = {
        "m.qweight": rng.integers(-(1 << 31), 1 << 31, (64, 2)).astype(np.int32),
        "m.qzeros": rng.integers(-(1 << 31), 1 << 31, (2, 2)).astype(np.int32),
        "m.scales": rng.random((2, 16), np.float32).astype(np.float16),
    }
    return tensors, {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}


def _compressed() -> tuple[dict[str, Any], dict[str, Any]]:
    tensor = round_to_nearest(random((8, 64)), QuantScheme(4, 32, False))
    words, zeros = pack.compressed_words(tensor)
    tensors = {
        "m.weight_packed": words,
        "m.weight_zero_point": zeros,
        "m.weight_scale": tensor.scale.astype(np.float16),
        "m.weight_shape": np.array([8, 64], np.int64),
        "m.weight_g_idx": (np.arange(64) // 32).astype(np.int32),
        "n.weight": np.arange(8, dtype=np.int8).reshape(2, 4),
        "n.weight_scale": np.ones((2, 1), np.float16),
    }
    args = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 32, "dynamic": False}
    group = {"targets": ["Linear"], "weights": args, "input_activations": None}
    quantization = {"quant_method": "compressed-tensors", "format": "mixed-precision", "ignore": []}
    return tensors, {**quantization, "config_groups": {"group_0": group}}


LAYOUTS = {"gptq": _gptq, "awq": _awq, "compressed": _compressed}


@pytest.fixture(scope="module", params=list(LAYOUTS))
def quantised_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors, quantization = LAYOUTS[request.param]()
    return write_folder(tmp_path_factory.mktemp(request.param), tensors, quantization)


@fuzzed
@given(data=st.data())
def test_quantised_layouts(quantised_folder: Path, data: st.DataObject) -> None:
    """Change the configuration, the header (types and shapes of the parts), or bytes of the parts themselves."""
    weights, config = quantised_folder / "model.safetensors", quantised_folder / "config.json"
    whole, settings_ = _original(weights), _original(config)
    what = data.draw(st.sampled_from(["config", "header", "bytes", "part"]))
    weights.write_bytes(whole)
    config.write_bytes(settings_)
    if what == "config":
        config.write_text(json.dumps(data.draw(changed(json.loads(settings_)))))
    elif what == "header":
        weights.write_bytes(_rewrite(whole, data.draw(changed(_header(whole)))))
    elif what == "bytes":
        start = 8 + int.from_bytes(whole[:8], "little")
        place = data.draw(st.integers(start, len(whole) - 8))
        weights.write_bytes(_edit(whole, "u64", place, data.draw(NUMBERS)))
    else:
        weights.write_bytes(_rewrite(whole, _reshaped(data, _header(whole))))
    survive(quantised_folder)


def _reshaped(data: st.DataObject, header: Any) -> Any:
    """A header that is valid by itself, in which one part has another type or shape of as many bytes, or is missing."""
    name = data.draw(st.sampled_from([name for name in header if name != "__metadata__"]))
    part = header[name]
    count = part["data_offsets"][1] - part["data_offsets"][0]
    dtype, size = data.draw(
        st.sampled_from([("I8", 1), ("U8", 1), ("F16", 2), ("BF16", 2), ("I32", 4), ("F32", 4), ("I64", 8)])
    )
    elements = count // size
    splits = [[elements], [1, elements], [elements, 1], [2, elements // 2], [1, 1, elements], [0, elements]]
    header[name] = {**part, "dtype": dtype, "shape": data.draw(st.sampled_from(splits))}
    if data.draw(st.booleans()):
        header[data.draw(st.sampled_from(["m.unknown", "m.weight", "k.weight_packed", "k.qweight"]))] = header.pop(name)
    return header


def test_the_originals_are_sound(tmp_path: Path) -> None:
    """Else the above would test nothing but the first check."""
    assert survive(write_tiny_gguf(tmp_path / "tiny.gguf"))
    assert survive(write_tiny_gguf(tmp_path / "one.gguf", {}, {"t": DenseTensor("float32", random((2, 2)))}))
    for name, make in LAYOUTS.items():
        assert survive(write_folder(tmp_path / name, *make()))
