"""The safetensors reader and writer against the `safetensors` package, and quantised layouts against their oracles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from miaotui.checkpoint import open_checkpoint
from miaotui.checkpoint.write import Stored, write_sharded
from miaotui.errors import CheckpointError, UnsupportedModelError
from miaotui.quant import pack
from miaotui.quant.rounding import bfloat16_bits, round_to_nearest
from miaotui.quant.scheme import QuantScheme
from miaotui.quant.tensor import DenseTensor, GroupedTensor
from tests.checkpoint.making import random, write_config, write_file, write_folder


def test_dense_types_and_views(tmp_path: Path) -> None:
    weight = random((3, 5))
    folder = write_folder(
        tmp_path,
        {"a": weight, "b": weight.astype(np.float16), "c": ("BF16", bfloat16_bits(weight)), "empty": weight[:0]},
    )
    checkpoint = open_checkpoint(folder)
    assert checkpoint.format == "safetensors"
    assert checkpoint.config["model_type"] == "llama"
    assert sorted(checkpoint.names()) == ["a", "b", "c", "empty"]
    np.testing.assert_array_equal(checkpoint.tensor("a").dense32(), weight)
    np.testing.assert_array_equal(checkpoint.tensor("b").dense32(), weight.astype(np.float16).astype(np.float32))
    rounded = (bfloat16_bits(weight).astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(checkpoint.tensor("c").dense32(), rounded)
    assert checkpoint.tensor("empty").shape == (0, 5)
    tensor = checkpoint.tensor("a")
    assert isinstance(tensor, DenseTensor)
    assert not tensor.data.flags.owndata
    assert not tensor.data.flags.writeable


def test_the_package_reads_ours_and_we_read_the_packages(tmp_path: Path) -> None:
    arrays = {"x": random((4, 3)), "y": np.arange(6, dtype=np.int64), "h": random((2,)).astype(np.float16)}
    write_file(tmp_path / "ours.safetensors", arrays)
    for name, array in load_file(tmp_path / "ours.safetensors").items():
        np.testing.assert_array_equal(array, arrays[name])
    folder = tmp_path / "theirs"
    folder.mkdir()
    write_config(folder)
    save_file({"x": arrays["x"], "h": arrays["h"]}, folder / "model.safetensors")
    np.testing.assert_array_equal(open_checkpoint(folder).tensor("x").dense32(), arrays["x"])


def test_sharded(tmp_path: Path) -> None:
    arrays = {f"layer.{i}": random((8, 8), i) for i in range(5)}
    write_config(tmp_path)
    paths = write_sharded(
        tmp_path, [Stored(name, "F32", (8, 8)) for name in arrays], arrays.__getitem__, shard_bytes=600
    )
    assert [path.name for path in paths] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 5 * 256
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.names() == list(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(checkpoint.tensor(name).dense32(), array)
    assert checkpoint.nbytes == sum(path.stat().st_size for path in paths)


def test_a_single_file_of_another_name(tmp_path: Path) -> None:
    write_config(tmp_path)
    write_file(tmp_path / "weights.safetensors", {"x": random((2, 2))})
    for path in (tmp_path, tmp_path / "weights.safetensors"):
        assert open_checkpoint(path).names() == ["x"]
    write_file(tmp_path / "more.safetensors", {"x": random((2, 2))})
    with pytest.raises(CheckpointError, match=r"2 \.safetensors files"):
        open_checkpoint(tmp_path)


def test_integer_and_float8_tensors_are_named_when_asked_for(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, {"ids": np.arange(3, dtype=np.int64)})
    with pytest.raises(UnsupportedModelError, match="'ids' as I64"):
        open_checkpoint(folder).tensor("ids")


# -- compressed-tensors --------------------------------------------------------------------------------------
def compressed_config(format: str = "pack-quantized", **weights: Any) -> dict[str, Any]:
    args = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, **weights}
    group = {"targets": ["Linear"], "weights": args, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": format, "quantization_status": "compressed",
        "ignore": ["lm_head"], "config_groups": {"group_0": group}, "kv_cache_scheme": None,
    }  # fmt: skip


def packed_parts(tensor: GroupedTensor, scale_type: str = "float16") -> dict[str, Any]:
    words, zeros = pack.compressed_words(tensor)
    scale = ("BF16", bfloat16_bits(tensor.scale)) if scale_type == "bfloat16" else tensor.scale.astype(scale_type)
    parts = {
        "m.weight_packed": words,
        "m.weight_scale": scale,
        "m.weight_shape": np.array(tensor.shape, np.int64),
    }
    return parts if zeros is None else {**parts, "m.weight_zero_point": zeros}


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scale_type", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(
    ("size", "shape"), [(32, (8, 96)), (None, (5, 40)), (64, (3, 64)), (128, (3, 64)), (32, (4, 80))]
)
def test_pack_quantized(
    tmp_path: Path, symmetric: bool, scale_type: Any, size: int | None, shape: tuple[int, int]
) -> None:
    tensor = round_to_nearest(random(shape), QuantScheme(4, size, symmetric, scale_type))
    config = compressed_config(
        symmetric=symmetric, group_size=size, strategy="group" if size else "channel", actorder=None
    )
    folder = write_folder(tmp_path, {**packed_parts(tensor, scale_type), "norm.weight": random((4,))}, config)
    checkpoint = open_checkpoint(folder)
    assert sorted(checkpoint.names()) == ["m.weight", "norm.weight"]
    read = checkpoint.tensor("m.weight")
    assert isinstance(read, GroupedTensor)
    assert read.scheme.symmetric == symmetric
    assert read.scheme.group_size == (size if size and size <= shape[1] else None)
    np.testing.assert_array_equal(read.codes, tensor.codes)
    np.testing.assert_array_equal(read.dense32(), tensor.dense32())


def through_the_package(
    form: str, weight: NDArray[np.float32], weights: dict[str, Any], inputs: dict[str, Any] | None = None
) -> tuple[dict[str, Any], NDArray[np.float32]]:
    """What compressed-tensors stores of a matrix with its own scales, and what it reads of that again."""
    torch = pytest.importorskip("torch", reason="the oracle needs torch")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    args = QuantizationArgs(**weights)
    input_args = QuantizationArgs(**inputs) if inputs else None
    scheme = QuantizationScheme(targets=["Linear"], weights=args, input_activations=input_args)
    strategy = weights["strategy"]
    size = {"tensor": weight.size, "channel": weight.shape[1]}.get(strategy, args.group_size)
    groups = torch.from_numpy(weight).reshape(1 if size == weight.size else weight.shape[0], -1, size)
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    if strategy == "tensor":
        scale, zero = scale.reshape(1), zero.reshape(1)
    compressor = BaseCompressor.get_value_from_registry(form)
    state = {"weight": torch.from_numpy(weight), "weight_scale": scale, "weight_zero_point": zero}
    stored = compressor.compress(dict(state), scheme)
    arrays = {
        f"m.{name}": ("F8_E4M3", value.view(torch.uint8).numpy()) if value.dtype is torch.float8_e4m3fn
        else value.numpy() for name, value in stored.items()
    }  # fmt: skip
    return arrays, compressor.decompress(dict(stored), scheme)["weight"].float().numpy()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("form", ["pack-quantized", "int-quantized"])
def test_what_the_package_compressed(tmp_path: Path, symmetric: bool, bits: int, form: str) -> None:
    """3, 5, 6 and 7 bits lie over the borders of words, in the rows of zero points (18 of them) too."""
    weights = {"num_bits": bits, "symmetric": symmetric, "strategy": "group", "group_size": 32}
    arrays, expected = through_the_package(form, random((18, 96)), weights)
    read = open_checkpoint(write_folder(tmp_path, arrays, compressed_config(form, **weights))).tensor("m.weight")
    assert isinstance(read, GroupedTensor)
    assert read.scheme.bits == bits
    np.testing.assert_allclose(read.dense32(), expected, rtol=0, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_package_reads_the_words_that_we_pack(bits: int, symmetric: bool) -> None:
    torch = pytest.importorskip("torch", reason="the oracle needs torch")
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    tensor = round_to_nearest(random((18, 80)), QuantScheme(bits, 16, symmetric))
    words, zeros = pack.compressed_words(tensor)
    middle = 1 << (bits - 1)
    codes = unpack_from_int32(torch.from_numpy(words), bits, torch.Size(tensor.shape)).numpy()
    np.testing.assert_array_equal(codes.astype(np.int64) + middle, tensor.codes)
    if not symmetric:
        assert zeros is not None
        points = unpack_from_int32(torch.from_numpy(zeros), bits, torch.Size(tensor.scale.shape), packed_dim=0)
        np.testing.assert_array_equal(points.numpy().astype(np.int64) + middle, pack.zero_points(tensor))


@pytest.mark.parametrize("strategy", ["channel", "tensor"])
@pytest.mark.parametrize("dynamic", [True, False])
def test_float_quantized_equals_the_package(tmp_path: Path, strategy: str, dynamic: bool) -> None:
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy}
    inputs = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token" if dynamic else "tensor",
              "dynamic": dynamic}  # fmt: skip
    weight = random((6, 40))
    weight[0, :4] = [1e-3, -2e-4, 0, 3e-6]  # subnormal and vanishing codes
    arrays, expected = through_the_package("float-quantized", weight, weights, inputs)
    config = compressed_config("float-quantized", **weights, group_size=None)
    config["config_groups"]["group_0"]["input_activations"] = inputs
    if not dynamic:
        arrays["m.input_scale"] = np.array([0.02], np.float32)
    checkpoint = open_checkpoint(write_folder(tmp_path, arrays, config))
    assert checkpoint.names() == ["m.weight"]
    np.testing.assert_array_equal(checkpoint.tensor("m.weight").dense32(), expected)


def test_e4m3_means_what_torch_says() -> None:
    torch = pytest.importorskip("torch", reason="the oracle needs torch")
    every = np.arange(256, dtype=np.uint8)
    expected = torch.from_numpy(every).view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(pack.e4m3(every), expected)


def test_scales_of_inputs_and_of_the_cache_are_read_past(tmp_path: Path) -> None:
    """They are for engines that code activations so; the weights are the same without them."""
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    inputs = {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "tensor", "dynamic": False}
    arrays, expected = through_the_package("int-quantized", random((6, 40)), weights, inputs)
    arrays |= {"m.input_scale": np.array([0.02], np.float32), "m.input_zero_point": np.array([3], np.int8)}
    config = compressed_config("int-quantized", **weights, group_size=None)
    config["config_groups"]["group_0"]["input_activations"] = inputs
    config["kv_cache_scheme"] = {"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": False}
    checkpoint = open_checkpoint(write_folder(tmp_path, arrays, config))
    assert checkpoint.names() == ["m.weight"]
    np.testing.assert_allclose(checkpoint.tensor("m.weight").dense32(), expected, rtol=1e-6)


def test_widths_that_fit_two_schemes_are_not_guessed(tmp_path: Path) -> None:
    tensor = round_to_nearest(random((4, 8)), QuantScheme(3, None, True))
    config = compressed_config(num_bits=3, group_size=None, strategy="channel")
    config["config_groups"]["group_1"] = compressed_config(group_size=None, strategy="channel")["config_groups"][
        "group_0"
    ]
    folder = write_folder(tmp_path, packed_parts(tensor), config)
    with pytest.raises(CheckpointError, match="1 words in a row of 8"):
        open_checkpoint(folder).tensor("m.weight")


def test_damaged_floats_are_named(tmp_path: Path) -> None:
    config = compressed_config("float-quantized", num_bits=8, type="float", strategy="channel", group_size=None)
    for weight, scale in (((3, 4), (3, 2)), ((3, 4), (2, 1)), ((4,), (4, 1)), ((), (1,))):
        parts = {"m.weight": ("F8_E4M3", np.zeros(weight, np.uint8)), "m.weight_scale": np.ones(scale, np.float32)}
        with pytest.raises(CheckpointError, match=r"m\.weight"):
            open_checkpoint(write_folder(tmp_path, parts, config)).tensor("m.weight")


def test_int_quantized_per_channel_with_dynamic_activations(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).integers(-128, 128, (4, 24), dtype=np.int8)
    scale = (np.abs(random((4, 1))) + 0.1).astype(np.float16)
    config = compressed_config("int-quantized", num_bits=8, strategy="channel", group_size=None)
    config["config_groups"]["group_0"]["input_activations"] = {
        "num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True,
    }  # fmt: skip
    checkpoint = open_checkpoint(write_folder(tmp_path, {"m.weight": weight, "m.weight_scale": scale}, config))
    read = checkpoint.tensor("m.weight")
    assert isinstance(read, GroupedTensor)
    assert read.by_token
    assert str(read.scheme) == "w8-channel-sym"
    np.testing.assert_array_equal(read.dense32(), weight.astype(np.float32) * scale.astype(np.float32))


@pytest.mark.parametrize(
    ("named", "coded", "static", "expected"),
    [(["re:.*down$"], 0, False, (True, False)), (["x.down"], 0, False, (True, False)),
     (["other"], 0, False, (True, True)), (["re:.*down$"], 1, False, (False, True)), ([], 0, True, (False, False))],
)  # fmt: skip
def test_whose_inputs_are_coded_by_token(
    tmp_path: Path, named: list[str], coded: int, static: bool, expected: tuple[bool, bool]
) -> None:
    """A group that names a module goes before the one of its class; scales known beforehand are not ours."""
    inputs = {"num_bits": 8, "type": "int", "strategy": "tensor" if static else "token", "dynamic": not static}
    config = compressed_config("int-quantized", num_bits=8, strategy="channel", group_size=None)
    groups = config["config_groups"]
    groups["group_1"] = {**groups["group_0"], "targets": named}
    groups[f"group_{coded}"]["input_activations"] = inputs
    parts: dict[str, Any] = {}
    for name in ("x.up", "x.down"):
        parts[f"{name}.weight"] = np.ones((4, 24), np.int8)
        parts[f"{name}.weight_scale"] = np.ones((4, 1), np.float32)
    checkpoint = open_checkpoint(write_folder(tmp_path, parts, config))
    read = [checkpoint.tensor(f"{name}.weight") for name in ("x.up", "x.down")]
    assert tuple(isinstance(tensor, GroupedTensor) and tensor.by_token for tensor in read) == expected


def test_g_idx(tmp_path: Path) -> None:
    tensor = round_to_nearest(random((4, 96)), QuantScheme(4, 32, True))
    g_idx = np.random.default_rng(1).permutation(np.arange(96) // 32).astype(np.int32)
    parts = {**packed_parts(tensor), "m.weight_g_idx": g_idx}
    read = open_checkpoint(write_folder(tmp_path, parts, compressed_config(actorder="group"))).tensor("m.weight")
    expected = (tensor.codes.astype(np.float32) - 8) * tensor.scale[:, g_idx]
    np.testing.assert_array_equal(read.dense32(), expected)
    parts["m.weight_g_idx"] = np.zeros(96, np.int32)
    write_folder(tmp_path, parts, compressed_config())
    with pytest.raises(CheckpointError, match="unequal size"):
        open_checkpoint(tmp_path).tensor("m.weight")


def with_group(key: str, value: Any) -> dict[str, Any]:
    config = compressed_config()
    config["config_groups"]["group_0"][key] = value
    return config


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (compressed_config(type="float", num_bits=8), r"weights\.strategy = 'group'"),
        (compressed_config(type="float", strategy="tensor", group_size=None), r"weights\.num_bits = '4'"),
        (compressed_config("nvfp4-pack-quantized"), "nvfp4-pack-quantized"),
        (compressed_config("marlin-24"), "marlin-24"),
        (compressed_config(strategy="block"), "block"),
        (compressed_config(num_bits=1), "int/1"),
        (compressed_config(num_bits=9), "int/9"),
        (compressed_config(wavelets=1), "wavelets"),
        ({**compressed_config(), "hadamard": True}, "hadamard"),
        ({**compressed_config(), "transform_config": {"config_groups": {}}}, "transform_config"),
        ({**compressed_config(), "kv_cache_scheme": {"num_bits": 4}}, r"kv_cache_scheme\.num_bits"),
        ({**compressed_config(), "kv_cache_scheme": {"strategy": "attn_head"}}, r"kv_cache_scheme\.strategy"),
        ({**compressed_config(), "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
        (with_group("input_activations", {"num_bits": 4, "dynamic": True}), r"input_activations\.num_bits"),
        (with_group("input_activations", {"num_bits": 8, "strategy": "group"}), r"input_activations\.strategy"),
        (with_group("input_activations", {"num_bits": 8, "dynamic": "local"}), r"input_activations\.dynamic"),
        (with_group("input_activations", {"num_bits": 8, "wavelets": 1}), r"input_activations\.wavelets"),
        (with_group("output_activations", {"num_bits": 8}), "output_activations"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": ["gptq"]}, "quant_method"),
        ([], "quant_method"),
        ({"quant_method": "gptq", "bits": 3, "group_size": 32}, "bits = '3'"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 0}, "group_size"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "marlin"),
        ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemv"}, "gemv"),
    ],
)
def test_what_is_not_understood_is_named(tmp_path: Path, config: Any, named: str) -> None:
    folder = write_folder(tmp_path, {"x": random((2,))}, config)
    with pytest.raises(UnsupportedModelError, match=named):
        open_checkpoint(folder)


# -- GPTQ and AWQ --------------------------------------------------------------------------------------------
def gptq_parts(version: int, zeros: NDArray[np.int32], g_idx: NDArray[np.int32] | None) -> tuple[dict[str, Any], Any]:
    """Stored parts of a random GPTQ matrix 16 × 64, and its values by the definition."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (16, 64), dtype=np.uint8)
    scale = (rng.random((2, 16), np.float32) + 0.1).astype(np.float16)
    group = np.arange(64) // 32 if g_idx is None else g_idx
    values = (codes - zeros.T[:, group]).astype(np.float32) * scale.astype(np.float32).T[:, group]
    parts = {
        "m.qweight": np.ascontiguousarray(pack.pack_words(codes, 4).T),
        "m.qzeros": pack.pack_words(((zeros - (2 - version)) & 15).astype(np.uint8), 4),
        "m.scales": scale,
    }
    return ({**parts, "m.g_idx": g_idx} if g_idx is not None else parts), values


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("order", ["none", "trivial", "shuffled"])
def test_gptq(tmp_path: Path, version: int, order: str) -> None:
    zeros = np.random.default_rng(1).integers(0, 16, (2, 16), dtype=np.int32)
    trivial = (np.arange(64) // 32).astype(np.int32)
    shuffled = np.random.default_rng(2).permutation(trivial)
    parts, values = gptq_parts(version, zeros, {"none": None, "trivial": trivial, "shuffled": shuffled}[order])
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": order == "shuffled"}
    config["checkpoint_format"] = "gptq" if version == 1 else "gptq_v2"
    checkpoint = open_checkpoint(write_folder(tmp_path, {**parts, "m.bias": random((16,))}, config))
    assert sorted(checkpoint.names()) == ["m.bias", "m.weight"]
    read = checkpoint.tensor("m.weight")
    assert isinstance(read, GroupedTensor)
    assert (read.perm is None) == (order != "shuffled")
    np.testing.assert_array_equal(read.dense32(), values)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("says", ["gptq", "gptq_v2", None])
def test_a_symmetric_gptq_file_is_told_by_its_zeros(tmp_path: Path, version: int, says: str | None) -> None:
    parts, values = gptq_parts(version, np.full((2, 16), 8, np.int32), None)
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "checkpoint_format": says}
    read = open_checkpoint(write_folder(tmp_path, parts, config)).tensor("m.weight")
    assert isinstance(read, GroupedTensor)
    assert read.scheme == QuantScheme(4, 32, True)
    np.testing.assert_array_equal(read.dense32(), values)


def test_a_weight_both_whole_and_in_parts(tmp_path: Path) -> None:
    parts, _ = gptq_parts(1, np.full((2, 16), 8, np.int32), None)
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    with pytest.raises(CheckpointError, match="both whole and in parts"):
        open_checkpoint(write_folder(tmp_path, {**parts, "m.weight": random((16, 64))}, config))


def test_gptq_described_beside_the_weights(tmp_path: Path) -> None:
    parts, values = gptq_parts(1, np.full((2, 16), 8, np.int32), None)
    write_folder(tmp_path, parts)
    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 32}))
    np.testing.assert_array_equal(open_checkpoint(tmp_path).tensor("m.weight").dense32(), values)


def test_awq(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    codes = rng.integers(0, 16, (64, 16), dtype=np.uint8)
    zeros = rng.integers(0, 16, (2, 16), dtype=np.uint8)
    scale = (rng.random((2, 16), np.float32) + 0.1).astype(np.float16)

    def words(values: NDArray[np.uint8]) -> NDArray[np.int32]:
        return pack.pack_words(values.reshape(values.shape[0], -1, 8)[..., order].reshape(values.shape), 4)

    parts = {"m.qweight": words(codes), "m.qzeros": words(zeros), "m.scales": scale}
    config = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "GEMM"}
    read = open_checkpoint(write_folder(tmp_path, parts, config)).tensor("m.weight")
    group = np.arange(64) // 32
    expected = (codes.astype(np.float32) - zeros[group]) * scale.astype(np.float32)[group]
    np.testing.assert_array_equal(read.dense32(), expected.T)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("m.qzeros", None),
        ("m.scales", None),
        ("m.scales", np.zeros((3, 16), np.float16)),
        ("m.scales", np.zeros((16,), np.float16)),
        ("m.scales", np.zeros((0, 16), np.float16)),
        ("m.qzeros", np.zeros((2, 3), np.int32)),
        ("m.qweight", np.zeros((8, 16), np.int64)),
        ("m.qweight", np.zeros((8, 2, 8), np.int32)),
        ("m.g_idx", np.full(64, 9, np.int32)),
        ("m.g_idx", np.zeros(3, np.int32)),
    ],
)
def test_parts_that_do_not_fit_together(tmp_path: Path, part: str, value: Any) -> None:
    parts, _ = gptq_parts(1, np.full((2, 16), 8, np.int32), None)
    parts = {name: array for name, array in {**parts, part: value}.items() if array is not None}
    folder = write_folder(tmp_path, parts, {"quant_method": "gptq", "bits": 4, "group_size": 32})
    with pytest.raises(CheckpointError, match=r"m\.weight"):
        open_checkpoint(folder).tensor("m.weight")
