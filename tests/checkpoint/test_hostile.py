"""Files made to hurt: one CheckpointError each, at once, and without the memory they claim."""

from __future__ import annotations

import json
import os
import struct
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from miaotui.checkpoint import open_checkpoint
from miaotui.errors import CheckpointError, UnsupportedModelError
from miaotui.quant.tensor import DenseTensor
from tests.checkpoint.making import random, write_config, write_file, write_folder, write_tiny_gguf


@pytest.fixture(autouse=True)
def _soon_and_small() -> Iterator[None]:
    """Every refusal within 10 seconds and 300 MB of Python's memory; most take neither."""
    tracemalloc.start()
    start = time.monotonic()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.monotonic() - start < 10
    assert peak < 300 << 20


def refused(path: Path, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        open_checkpoint(path)
    assert caught.value.hint


# -- safetensors ---------------------------------------------------------------------------------------------
def folder_with(tmp_path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    write_config(tmp_path)
    size = struct.pack("<Q", len(text) if length is None else length)
    (tmp_path / "model.safetensors").write_bytes(size + text + data)
    return tmp_path


def entry(shape: Any = (2,), offsets: Any = (0, 8), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("header", "match"),
    [
        ({"a": entry(), "b": entry(offsets=[4, 12])}, "overlaps"),
        ({"a": entry(), "b": entry()}, "overlaps"),
        ({"a": entry(), "b": entry(offsets=[12, 20])}, "hole"),
        ({"a": entry(offsets=[8, 16])}, "hole"),
        ({"a": entry(offsets=[8, 0])}, "bytes where its shape needs"),
        ({"a": entry([4], [0, 16])}, "end at byte"),
        ({"a": entry([1 << 40], [0, 1 << 42])}, "end at byte"),
        ({"a": entry([1 << 62, 1 << 62], [0, 8])}, "impossible"),
        ({"a": entry([1 << 40] * 9, [0, 8])}, "bytes where its shape needs"),
        ({"a": entry([-2], [0, 8])}, "impossible"),
        ({"a": entry([True], [0, 4])}, "impossible"),
        ({"a": entry([2.0], [0, 8])}, "impossible"),
        ({"a": entry("2", [0, 8])}, "impossible"),
        ({"a": entry([1] * 100, [0, 4])}, "impossible"),
        ({"a": entry([2], [0])}, "impossible"),
        ({"a": entry([2], [0, 1 << 80])}, "impossible"),
        ({"a": entry([2], None)}, "impossible"),
        ({"a": entry(dtype="F33")}, "unknown type"),
        ({"a": entry(dtype=["F32"])}, "unknown type"),
        ({"a": entry(dtype="F4", shape=[3], offsets=[0, 1])}, "bytes where"),
        ({"a": {"dtype": "F32", "shape": [2]}}, "is not a dtype, a shape and offsets"),
        ({"a": {**entry(), "extra": 1}}, "is not a dtype"),
        ({"a": None}, "is not a dtype"),
        ([1], "not an object"),
        (b'{"a": {"dtype": "F32"', "damaged"),
        (b'{"a": 1, "a": 2}', "twice"),
        (b"\xff\xfe\x00", "damaged"),
        (b"[" * 500_000, "nested too deeply"),
        (b'{"a":' * 500_000, "nested too deeply"),
        (b"[" + b"[]," * 2_000_000 + b"[]]", "too many values"),
        (b'{"a": ' + b"9" * 100_000 + b"}", "damaged"),
        ({"x" * 1_000_000: entry(offsets=[8, 16])}, "hole"),
    ],
)  # fmt: skip
def test_headers(tmp_path: Path, header: Any, match: str) -> None:
    refused(folder_with(tmp_path, header, bytes(8)), match)


@pytest.mark.parametrize("length", [9, 1 << 20, 100_000_001, 1 << 40, (1 << 64) - 1])
def test_header_lengths(tmp_path: Path, length: int) -> None:
    refused(folder_with(tmp_path, {}, b"", length), "claims a header")


def test_a_header_over_the_bound_is_not_read(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, {}, b"", 200_000_000)
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(300_000_000)  # a hole: takes no disk
    refused(folder, "claims a header of 200000000")


@pytest.mark.parametrize("size", [0, 1, 7])
def test_stubs(tmp_path: Path, size: int) -> None:
    write_config(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(bytes(size))
    refused(tmp_path, "empty|shorter")


def test_a_git_lfs_pointer_is_recognised(tmp_path: Path) -> None:
    write_config(tmp_path)
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    assert "git lfs pull" in caught.value.hint


def test_truncation_at_every_byte(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, {"a": random((2,)), "b": random((3,)).astype(np.float16)})
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        with pytest.raises(CheckpointError):
            open_checkpoint(folder)


# -- folders -------------------------------------------------------------------------------------------------
def indexed(folder: Path, weight_map: Any) -> Path:
    write_config(folder)
    write_file(folder / "a.safetensors", {"x": random((2,))})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize(
    ("weight_map", "match"),
    [
        ({"x": "../../etc/passwd"}, "says that"),
        ({"x": "../../etc/x.safetensors"}, "outside itself"),
        ({"x": "/etc/x.safetensors"}, "outside itself"),
        ({"x": "sub/../a.safetensors"}, "outside itself"),
        ({"x": "..\\a.safetensors"}, "outside itself"),
        ({"x": "a\0.safetensors"}, "outside itself"),
        ({"x": "y" * 300 + ".safetensors"}, "outside itself"),
        ({"x": ".safetensors"}, "lacks the file"),
        ({"x": "b.safetensors"}, "lacks the file"),
        ({"y": "a.safetensors"}, "and it is not"),
        ({"x": "model.safetensors.index.json"}, "says that"),
        ({"x": 3}, "says that"),
        ({"x": {"x": "a.safetensors"}}, "says that"),
        ({}, "no weight_map"),
        ([["x", "a.safetensors"]], "no weight_map"),
    ],
)
def test_an_index_cannot_lead_elsewhere(tmp_path: Path, weight_map: Any, match: str) -> None:
    refused(indexed(tmp_path, weight_map), match)


def test_links_stay_in_the_folder(tmp_path: Path) -> None:
    outside = tmp_path / "outside.safetensors"
    write_file(outside, {"x": random((2,))})
    folder = tmp_path / "model"
    folder.mkdir()
    indexed(folder, {"x": "b.safetensors"})
    (folder / "b.safetensors").symlink_to(outside)
    refused(folder, "leads out of its folder")
    (folder / "b.safetensors").unlink()
    (folder / "b.safetensors").symlink_to("b.safetensors")
    refused(folder, "lacks the file|cannot be followed|leads out")
    (folder / "b.safetensors").unlink()
    (folder / "b.safetensors").symlink_to("a.safetensors")
    assert open_checkpoint(folder).names() == ["x"]
    (folder / "tokenizer.json").symlink_to("/etc/passwd")
    with pytest.raises(CheckpointError, match="leads out"):
        open_checkpoint(folder).asset("tokenizer.json")
    with pytest.raises(CheckpointError, match="outside itself"):
        open_checkpoint(folder).asset("../outside.safetensors")


def test_links_into_the_hub_caches_blobs_are_what_it_is_made_of(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / ("a" * 40)
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    write_config(blobs)
    write_file(blobs / "abc", {"x": random((2,))})
    (snapshot / "model.safetensors").symlink_to("../../blobs/abc")
    (snapshot / "config.json").symlink_to("../../blobs/config.json")
    assert open_checkpoint(snapshot).names() == ["x"]
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to("../../refs")
    refused(snapshot, "leads out")


@pytest.mark.parametrize("config", [None, b"", b"[]", b"{", b"[" * 100_000, b'{"a": 1, "a": 2}', b"\xff"])
def test_configurations(tmp_path: Path, config: bytes | None) -> None:
    folder = write_folder(tmp_path, {"x": random((2,))})
    (folder / "config.json").unlink()
    if config is not None:
        (folder / "config.json").write_bytes(config)
    refused(folder, "config.json")


def test_unreadable_files(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, {"x": random((2,))})
    (folder / "model.safetensors").chmod(0)
    if os.access(folder / "model.safetensors", os.R_OK):
        pytest.skip("running as a user whom no permission stops")
    refused(folder, "cannot be opened")


# -- GGUF ----------------------------------------------------------------------------------------------------
def text(data: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(data) if length is None else length) + data


def header(body: bytes, tensors: int = 0, keys: int = 1, version: int = 3, magic: bytes = b"GGUF") -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, keys) + body


def pair(kind: int, value: bytes, key: bytes = b"k") -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def array(kind: int, count: int, data: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + data


def info(name: bytes = b"t", shape: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0) -> bytes:
    extents = b"".join(struct.pack("<Q", extent) for extent in shape)
    return text(name) + struct.pack("<I", len(shape)) + extents + struct.pack("<IQ", kind, offset)


HUGE = (1 << 64) - 1


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (header(b"", version=1), "version is 1"),
        (header(b"", version=4), "version is 4"),
        (header(b"", version=3 << 24), "big-endian"),
        (header(b"", keys=HUGE), "more than fit"),
        (header(b"", tensors=HUGE), "more than fit"),
        (header(bytes(5_000_000), keys=200_000), "more than fit"),
        (header(pair(8, text(b"", HUGE))), "ends early"),
        (header(pair(8, text(b"abc", 1 << 30))), "ends early"),
        (header(text(b"k" * 70_000) + bytes(20)), "70000 bytes long"),
        (header(text(b"", HUGE) + bytes(20)), "bytes long"),
        (header(text(b"\xff\xfe") + bytes(20)), "not UTF-8"),
        (header(pair(4, b"\1\0\0\0") * 2, keys=2), "appears twice"),
        (header(pair(7, b"\2")), "truth value"),
        (header(pair(99, bytes(20))), "unknown type 99"),
        (header(pair(9, array(99, 1, bytes(20)))), "unknown type 99"),
        (header(pair(9, array(7, 2, b"\1\2"))), "truth value"),
        (header(pair(9, array(4, HUGE, bytes(20)))), "ends early"),
        (header(pair(9, array(12, 1 << 61, bytes(20)))), "ends early"),
        (header(pair(9, array(8, HUGE, bytes(20)))), "claims"),
        (header(pair(9, array(8, 2, text(b"a") + text(b"b", HUGE)))), "ends early"),
        (header(pair(9, array(9, HUGE, bytes(20)))), "claims"),
        (header(pair(9, array(9, 1) * 50 + bytes(20))), "nested too deeply"),
        (header(pair(9, array(8, 4_500_000, bytes(8 * 4_500_000)))), "claims 4500000"),
        (header(pair(9, array(9, 4_500_000, bytes(12 * 4_500_000)))), "claims 4500000"),
        (header(pair(4, struct.pack("<I", 24), b"general.alignment")), "alignment"),
        (header(pair(4, struct.pack("<I", 0), b"general.alignment")), "alignment"),
        (header(pair(4, struct.pack("<I", 1 << 31), b"general.alignment")), "alignment"),
        (header(pair(8, text(b"32"), b"general.alignment")), "alignment"),
        (header(info(shape=(1 << 40, 1 << 40)), 1, 0), "impossible shape"),
        (header(info(shape=(HUGE, HUGE, HUGE, HUGE)), 1, 0), "impossible shape"),
        (header(info(shape=(0, 4)), 1, 0), "impossible shape"),
        (header(info(shape=()) + bytes(9), 1, 0), "0 dimensions"),
        (header(info(shape=(1,) * 5), 1, 0), "5 dimensions"),
        (header(text(b"t") + struct.pack("<I", 1 << 31) + bytes(99), 1, 0), "dimensions"),
        (header(info(offset=HUGE - 31) + bytes(64), 1, 0), "ends at byte"),
        (header(info(offset=1 << 40) + bytes(64), 1, 0), "ends at byte"),
        (header(info(offset=4) + bytes(64), 1, 0), "aligned"),
        (header(info(shape=(33,), kind=2) + bytes(64), 1, 0), "whole blocks"),
        (header(info() * 2 + bytes(64), 2, 0), "appears twice"),
        (header(info() + info(b"u") + bytes(64), 2, 0), "overlap"),
        (header(info(shape=(16,)) + info(b"u", offset=32) + bytes(128), 2, 0), "overlap"),
        (header(info(b"\xff") + bytes(64), 1, 0), "not UTF-8"),
    ],
)  # fmt: skip
def test_gguf(tmp_path: Path, data: bytes, match: str) -> None:
    (tmp_path / "bad.gguf").write_bytes(data)
    refused(tmp_path / "bad.gguf", match)


@pytest.mark.parametrize("kind", [4, 5, 31, 38, 1 << 31])
def test_gguf_types_that_are_no_longer_or_not_yet(tmp_path: Path, kind: int) -> None:
    (tmp_path / "bad.gguf").write_bytes(header(info(kind=kind) + bytes(64), 1, 0))
    with pytest.raises(UnsupportedModelError, match=f"type {kind}"):
        open_checkpoint(tmp_path / "bad.gguf")


def test_gguf_truncated_at_every_byte(tmp_path: Path) -> None:
    path = write_tiny_gguf(
        tmp_path / "tiny.gguf", {"a": ["x", "y"], "b": 2}, {"t": DenseTensor("float32", random((9,)))}
    )
    whole = path.read_bytes()
    for end in range(len(whole) - 31):  # the file's last bytes are padding
        path.write_bytes(whole[:end])
        with pytest.raises(CheckpointError):
            open_checkpoint(path)


@pytest.mark.parametrize("count", [np.uint16(3), np.int32(-1), 1 << 40, "2", 2.5])
def test_a_split_that_is_not_one(tmp_path: Path, count: Any) -> None:
    path = write_tiny_gguf(tmp_path / "one.gguf", {"split.count": count})
    refused(path, "not named like one")


def test_a_tensor_in_two_files_of_a_split(tmp_path: Path) -> None:
    for i in (1, 2):
        write_tiny_gguf(tmp_path / f"m-0000{i}-of-00002.gguf", {"split.count": 2})
    refused(tmp_path, "another file of the model too")
