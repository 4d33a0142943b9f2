"""The GGUF reader and writer against the `gguf` package, and against the demo."""

from __future__ import annotations

import os
import time
from pathlib import Path

import gguf
import numpy as np
import pytest

from miaotui.checkpoint import open_checkpoint
from miaotui.checkpoint.gguf import GGUFCheckpoint
from miaotui.errors import CheckpointError, UnsupportedModelError
from miaotui.quant import pack
from miaotui.quant.tensor import BlockTensor, DenseTensor
from tests.checkpoint.making import METADATA, gguf_tensors, random, write_tiny_gguf


def test_what_we_write_we_read(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    checkpoint = open_checkpoint(path)
    tensors = gguf_tensors()
    assert checkpoint.format == "gguf"
    assert checkpoint.names() == list(tensors)
    assert checkpoint.nbytes == path.stat().st_size
    for name, expected in tensors.items():
        tensor = checkpoint.tensor(name)
        assert type(tensor) is type(expected)
        assert tensor.shape == expected.shape
        np.testing.assert_array_equal(tensor.dense32(), expected.dense32())
    for key, value in METADATA.items():
        if key == "nothing":
            assert checkpoint.config[key] == []
        elif key == "nested":
            assert [list(inner) for inner in checkpoint.config[key]] == value
        else:
            np.testing.assert_array_equal(checkpoint.config[key], value)
    assert checkpoint.config["tokenizer.ggml.tokens"] == METADATA["tokenizer.ggml.tokens"]
    assert checkpoint.config["a.flag"] is True


def test_the_gguf_package_reads_what_we_write(tmp_path: Path) -> None:
    metadata = {key: value for key, value in METADATA.items() if key not in ("nested", "nothing")}
    reader = gguf.GGUFReader(write_tiny_gguf(tmp_path / "tiny.gguf", metadata))
    tensors = gguf_tensors()
    assert [tensor.name for tensor in reader.tensors] == list(tensors)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(values, tensors[tensor.name].dense32())
    for key, value in metadata.items():
        np.testing.assert_array_equal(reader.get_field(key).contents(), value)


@pytest.mark.parametrize("kind", list(pack.KINDS))
def test_we_read_what_the_gguf_package_writes(tmp_path: Path, kind: str) -> None:
    spec = pack.KINDS[kind]
    data = np.random.default_rng(0).integers(0, 60, (3, 2 * spec.block_bytes), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "llama")
    writer.add_uint8("u8", 3)
    writer.add_int64("i64", -(1 << 40))
    writer.add_float64("f64", 0.1)
    writer.add_array("strings", ["a", "b\0c", "é"])
    writer.add_tensor("x", data, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.add_tensor("stack", random((2, 3, 32)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    checkpoint = GGUFCheckpoint(tmp_path / "other.gguf")
    tensor = checkpoint.tensor("x")
    assert isinstance(tensor, BlockTensor)
    assert tensor.shape == (3, 2 * spec.block_size)
    np.testing.assert_array_equal(tensor.dense32(), gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind]))
    np.testing.assert_array_equal(checkpoint.tensor("stack").matrix(1).dense32(), random((2, 3, 32))[1])
    assert checkpoint.config["strings"] == ["a", "b\0c", "é"]
    assert (checkpoint.config["u8"], checkpoint.config["i64"], checkpoint.config["f64"]) == (3, -(1 << 40), 0.1)


def test_alignment_of_the_file_is_kept(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "wide.gguf", "llama")
    writer.add_custom_alignment(256)
    writer.add_tensor("a", random((3,)))
    writer.add_tensor("b", random((4, 4)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    np.testing.assert_array_equal(GGUFCheckpoint(tmp_path / "wide.gguf").tensor("b").dense32(), random((4, 4)))


def test_a_split_is_one_model(tmp_path: Path) -> None:
    for i, name in enumerate("ab", start=1):
        tensors = {name: DenseTensor("float32", random((4,), i))}
        metadata = {"split.no": np.uint16(i - 1), "split.count": np.uint16(2)}
        write_tiny_gguf(tmp_path / f"m-0000{i}-of-00002.gguf", metadata, tensors)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.names() == ["a", "b"]
    np.testing.assert_array_equal(checkpoint.tensor("b").dense32(), random((4,), 2))
    absent = tmp_path / "m-00001-of-00002.gguf"
    absent.unlink()
    with pytest.raises(CheckpointError, match=r"m-00001-of-00002\.gguf is missing"):
        open_checkpoint(tmp_path)


def test_absent_tensor_and_asset(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_tiny_gguf(tmp_path / "tiny.gguf"))
    with pytest.raises(CheckpointError, match="no tensor 'q'"):
        checkpoint.tensor("q")
    assert checkpoint.asset("tokenizer.json") is None
    (tmp_path / "tokenizer.json").write_text("{}")
    assert checkpoint.asset("tokenizer.json") == tmp_path / "tokenizer.json"


def test_fingerprint_follows_the_file(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    before = open_checkpoint(path).fingerprint()
    assert open_checkpoint(path).fingerprint() == before
    write_tiny_gguf(path, {"general.architecture": "qwen2"})
    assert open_checkpoint(path).fingerprint() != before


def test_an_unsupported_type_is_named(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "iq.gguf", "llama")
    writer.add_tensor("x", np.zeros((1, 136), np.uint8), raw_dtype=gguf.GGMLQuantizationType.IQ4_XS)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModelError, match="IQ4_XS"):
        open_checkpoint(tmp_path)


def test_the_demo_is_read_exactly(demo_gguf: Path) -> None:
    checkpoint = open_checkpoint(demo_gguf)
    assert len(checkpoint.config["tokenizer.ggml.tokens"]) == 49152
    reader = gguf.GGUFReader(demo_gguf)
    assert checkpoint.names() == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors[:12]:
        ours = checkpoint.tensor(tensor.name)
        theirs = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert ours.shape == theirs.shape
        np.testing.assert_array_equal(ours.dense32(), theirs)
    assert checkpoint.config["tokenizer.ggml.merges"] == reader.get_field("tokenizer.ggml.merges").contents()


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from Linux's /proc")
def test_reading_all_of_it_keeps_little_of_it(demo_gguf: Path) -> None:
    checkpoint = open_checkpoint(demo_gguf)
    before = resident_bytes()
    largest = 0
    for name in checkpoint.names():
        tensor = checkpoint.tensor(name)
        assert isinstance(tensor, DenseTensor | BlockTensor)
        largest = max(largest, tensor.nbytes)
        tensor.data.max()
        assert resident_bytes() - before < largest + (16 << 20)
    assert largest < checkpoint.nbytes / 3


def test_the_demo_opens_in_a_moment(demo_gguf: Path) -> None:
    """25 ms on a 2-core cloud machine; the bound leaves room for a busy one."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        open_checkpoint(demo_gguf)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.06
