"""compressed-tensors: pack-, int- and float-quantized weights, and dense ones without their zeros."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from miaotui.checkpoint.layout import (
    Mismatch,
    Pieces,
    Scale,
    Stored,
    find_parts,
    fit_group_size,
    integers,
    known_keys,
    read_scale,
    refuse,
    same_shape,
    sort_by_group,
)
from miaotui.quant import pack
from miaotui.quant.bitmask import Bitmask, from_bitmask
from miaotui.quant.scheme import QuantScheme, ScaleType
from miaotui.quant.tensor import DenseTensor, DenseType, GroupedTensor, Tensor

_TOP_KEYS = (
    "quant_method", "format", "version", "quantization_status", "global_compression_ratio", "ignore",
    "config_groups", "run_compressed", "kv_cache_scheme", "sparsity_config", "transform_config",
    "moe_sparsity_config",
)  # fmt: skip
_ARGS_KEYS = (
    "num_bits", "type", "symmetric", "strategy", "group_size", "dynamic", "actorder", "observer",
    "observer_kwargs", "scale_dtype", "zp_dtype", "block_structure",
)  # fmt: skip
_FORMATS = (
    None, "pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision", "dense",
    "fakequant",
)  # fmt: skip

_SPARSITY_KEYS = ("format", "targets", "ignore", "global_sparsity", "sparsity_structure")
_DENSE: dict[str, DenseType] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class CompressedTensors:
    """`weight_packed` words or an int8 `weight`, `weight_scale`, and what may come with them.

    `schemes` are those of the configuration's integer groups: which of them a module has is told by its shapes.
    `inputs` are the groups' targets, and whether their inputs are coded to int8 with one scale a token. What says how
    activations or the KV cache may be coded otherwise (`input_scale`, `kv_cache_scheme`, `k_scale`, `v_scale`) is for
    engines that code them so; ours has its own ways (`--compute`, `--kv-cache-dtype`), and reads past it.
    """

    schemes: tuple[QuantScheme, ...]
    inputs: tuple[tuple[tuple[str, ...], bool], ...] = ()

    @classmethod
    def parse(cls, config: dict[str, Any]) -> CompressedTensors:
        known_keys("", config, _TOP_KEYS)
        for key in ("transform_config", "moe_sparsity_config"):
            if config.get(key):
                refuse(key, config[key])
        if config.get("kv_cache_scheme"):
            _check_bytes("kv_cache_scheme", config["kv_cache_scheme"], ("tensor",))
        sparsity = config.get("sparsity_config")
        if sparsity and not (isinstance(sparsity, dict) and sparsity.get("format") == "dense"):
            refuse("sparsity_config", sparsity)
        if config.get("format") not in _FORMATS:
            refuse("format", config["format"])
        groups = config.get("config_groups")
        if not isinstance(groups, dict):
            refuse("config_groups", groups)
        schemes = tuple(scheme for name, group in groups.items() for scheme in _schemes(name, group))
        return cls(schemes, tuple((_targets(name, group), _by_token(group)) for name, group in groups.items()))

    def find(self, entries: Mapping[str, Stored]) -> dict[str, dict[str, str]]:
        extras = (
            "weight_scale",
            "weight_zero_point",
            "weight_shape",
            "weight_g_idx",
            "input_scale",
            "input_zero_point",
        )
        found = find_parts(entries, "weight_packed", extras)
        for weight, parts in find_parts(entries, "weight", extras).items():
            if len(parts) > 1 and weight not in found:
                found[weight] = parts
        return found

    def join(self, name: str, pieces: Pieces) -> Tensor:
        if "weight_packed" in pieces:
            return self._with_inputs(name, self._packed(pieces))
        dtype, array = pieces["weight"]
        if dtype == "I8":
            return self._with_inputs(name, self._bytes(pieces))
        if dtype == "F8_E4M3":
            return self._floats(pieces)
        if dtype in _DENSE:  # rounded, but stored as floats ("dense", "fakequant")
            return DenseTensor(_DENSE[dtype], array)
        raise Mismatch(f"its weight is {dtype}")

    def _packed(self, pieces: Pieces) -> GroupedTensor:
        packed = integers(pieces, "weight_packed", 2)
        shape = integers(pieces, "weight_shape", 1, ("I64", "I32")).tolist()
        out, words = packed.shape
        if len(shape) != 2 or shape[0] != out or not 0 < shape[1] <= words * 32:
            raise Mismatch(f"its weight_shape is {shape} and its weight_packed's {packed.shape}")
        width = int(shape[1])
        found = {s.bits for s in self.schemes if -(-width * s.bits // 32) == words}
        if len(found) != 1:
            raise Mismatch(f"its weight_packed has {words} words in a row of {width}")
        (bits,) = found
        scale, kind = self._scales(pieces, out)
        scheme = self._scheme(bits, width, scale.shape[1], kind)
        zeros = None
        if "weight_zero_point" in pieces:
            zeros = integers(pieces, "weight_zero_point", 2)
            same_shape("weight_zero_point", zeros.shape, (-(-out * bits // 32), scale.shape[1]))
        g_idx = integers(pieces, "weight_g_idx", 1, ("I32", "I64")) if "weight_g_idx" in pieces else None
        perm = sort_by_group(g_idx, width, scale.shape[1], scheme.group_size)
        return pack.compressed_int4(packed, scale, zeros, scheme, width, perm)

    def _bytes(self, pieces: Pieces) -> GroupedTensor:
        """int-quantized: one int8 an element, also where the scheme has fewer bits."""
        weight = integers(pieces, "weight", 2, ("I8",))
        out, width = weight.shape
        scale, kind = self._scales(pieces, out)
        bits = self.schemes[0].bits if len({s.bits for s in self.schemes}) == 1 else 8
        scheme = self._scheme(bits, width, scale.shape[1], kind)
        middle = 1 << (bits - 1)
        if bits < 8 and weight.size and (weight.min() < -middle or weight.max() >= middle):
            raise Mismatch(f"its weight does not fit {bits} bits")
        codes = weight.view(np.uint8) + np.uint8(middle)
        zeros = np.full((1, 1), middle, np.int32)
        if "weight_zero_point" in pieces:
            points = integers(pieces, "weight_zero_point", pieces["weight_scale"][1].ndim, ("I8",))
            zeros = np.broadcast_to(points.reshape(-1, scale.shape[1]), scale.shape).astype(np.int32) + middle
        return pack.with_zero_points(scheme, codes, scale, zeros)

    def _with_inputs(self, name: str, tensor: GroupedTensor) -> GroupedTensor:
        """A target that names the module goes before one that names its class."""
        module = name.removesuffix(".weight")
        for targets, by_token in self.inputs:
            if any(_names(target, module) for target in targets):
                return replace(tensor, by_token=by_token)
        return replace(tensor, by_token=any(by_token for targets, by_token in self.inputs if "Linear" in targets))

    def _floats(self, pieces: Pieces) -> Tensor:
        """float-quantized: one e4m3 an element, a scale for each row."""
        weight = integers(pieces, "weight", 2, ("F8_E4M3",))
        scale, _ = self._scales(pieces, weight.shape[0])
        same_shape("weight_scale", scale.shape, (weight.shape[0], 1))
        with np.errstate(invalid="ignore", over="ignore"):  # a damaged file's inf and nan stay what they are
            return DenseTensor("float32", pack.e4m3(weight) * scale)

    def _scales(self, pieces: Pieces, out: int) -> Scale:
        """weight_scale as `[out, groups]`: `[1]` (whole tensor) and `[out]` are spread out."""
        scale, kind = read_scale(pieces, "weight_scale")
        if scale.ndim < 2:
            scale = scale.reshape(-1, 1)
        if scale.ndim != 2 or scale.shape[0] not in (1, out):
            raise Mismatch(f"its weight_scale has shape {scale.shape} for {out} rows")
        return np.array(np.broadcast_to(scale, (out, scale.shape[1]))), kind

    def _scheme(self, bits: int, width: int, groups: int, kind: ScaleType) -> QuantScheme:
        sizes = [scheme.group_size for scheme in self.schemes if scheme.bits == bits]
        return QuantScheme(bits, fit_group_size(width, groups, sizes), True, kind)


def _schemes(name: str, group: Any) -> list[QuantScheme]:
    """The weight scheme of a configuration group, checked; none when it leaves weights alone."""
    where = f"config_groups.{name[:40]}"
    known_keys(where, group, ("targets", "weights", "input_activations", "output_activations", "format"))
    if group.get("format") not in _FORMATS:
        refuse(f"{where}.format", group["format"])
    if group.get("output_activations"):
        refuse(f"{where}.output_activations", group["output_activations"])
    if group.get("input_activations"):
        _check_bytes(f"{where}.input_activations", group["input_activations"], ("tensor", "token"))
    weights = group.get("weights")
    if weights is None:
        return []
    if isinstance(weights, dict) and weights.get("type") == "float":
        _check_bytes(f"{where}.weights", weights, ("tensor", "channel"))
        return []
    return [_weight_scheme(f"{where}.weights", weights)]


def _targets(name: str, group: dict[str, Any]) -> tuple[str, ...]:
    targets = group.get("targets", [])
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        refuse(f"config_groups.{name[:40]}.targets", targets)
    return tuple(targets)


def _names(target: str, module: str) -> bool:
    """A module's name, or a pattern for its beginning."""
    if not target.startswith("re:"):
        return target == module
    try:
        return re.match(target[3:], module) is not None
    except re.error:
        refuse("targets", target)


def _by_token(group: dict[str, Any]) -> bool:
    """Whether inputs are coded to int8 as they come, with a scale for each token."""
    args = group.get("input_activations") or {}
    return args.get("type", "int") == "int" and bool(args.get("dynamic")) and args.get("strategy") == "token"


def _check_bytes(where: str, args: Any, strategies: tuple[str, ...]) -> None:
    """Integers or floats of 8 bits, whose scales are spread in one of these ways."""
    known_keys(where, args, _ARGS_KEYS)
    understood = {"num_bits": (8,), "type": (None, "int", "float"), "strategy": (None, *strategies),
                  "group_size": (None, -1), "dynamic": (None, False, True)}  # fmt: skip
    for key, values in understood.items():
        if args.get(key, values[0]) not in values:
            refuse(f"{where}.{key}", args[key])


def _weight_scheme(where: str, args: Any) -> QuantScheme:
    known_keys(where, args, _ARGS_KEYS)
    bits, size, strategy = args.get("num_bits", 8), args.get("group_size"), args.get("strategy")
    if args.get("type", "int") != "int" or bits not in pack.DENSE_BITS or type(bits) is not int:
        refuse(f"{where}.type/num_bits", f"{args.get('type', 'int')}/{bits}")
    if args.get("dynamic"):
        refuse(f"{where}.dynamic", args["dynamic"])
    if strategy not in (None, "group", "channel", "tensor"):
        refuse(f"{where}.strategy", strategy)
    if size is not None and (type(size) is not int or size < -1 or size == 0):
        refuse(f"{where}.group_size", size)
    return QuantScheme(bits, size if size and size > 0 else None, bool(args.get("symmetric", True)))


@dataclass(frozen=True)
class SparseBitmask:
    """compressed-tensors without its zeros: `compressed` values, the `bitmask` of where they stand, `row_offsets`."""

    @classmethod
    def parse(cls, config: dict[str, Any]) -> SparseBitmask:
        known_keys("", config, _TOP_KEYS)
        for key in ("config_groups", "kv_cache_scheme", "transform_config", "moe_sparsity_config"):
            if config.get(key):  # codes that are sparse too: nobody writes them any more
                refuse(key, config[key])
        if config.get("format") not in _FORMATS:
            refuse("format", config["format"])
        known_keys("sparsity_config", config["sparsity_config"], _SPARSITY_KEYS)
        return cls()

    def find(self, entries: Mapping[str, Stored]) -> dict[str, dict[str, str]]:
        return find_parts(entries, "bitmask", ("compressed", "row_offsets", "shape"))

    def join(self, name: str, pieces: Pieces) -> Tensor:
        mask, offsets = integers(pieces, "bitmask", 2, ("U8",)), integers(pieces, "row_offsets", 1, ("I64",))
        shape = integers(pieces, "shape", 1, ("I64",)).tolist()
        if "compressed" not in pieces:
            raise Mismatch("its compressed is missing")
        dtype, values = pieces["compressed"]
        if dtype not in _DENSE or values.ndim != 1:
            raise Mismatch(f"its compressed is {dtype} of shape {values.shape}")
        if len(shape) != 2 or shape[0] != len(mask) or shape[1] < 0 or -(-shape[1] // 8) != mask.shape[1]:
            raise Mismatch(f"its shape is {shape} and its bitmask's {mask.shape}")
        try:
            return DenseTensor(_DENSE[dtype], from_bitmask(Bitmask(values, mask, offsets), shape[1]))
        except ValueError as error:
            raise Mismatch(str(error)) from error
