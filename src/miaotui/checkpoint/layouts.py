"""Quantised layouts in safetensors: which stored tensors make up one weight, and what they mean together.

compressed-tensors (pack-quantized, int-quantized, float-quantized, sparse-bitmask), GPTQ (v1, v2) and AWQ (GEMM). What
a module is made of is told by the tensors that are there and their shapes; the configuration is checked for anything
that would change the mathematics and is not understood.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np
from numpy.typing import NDArray

from miaotui.checkpoint import files
from miaotui.errors import UnsupportedModelError
from miaotui.quant import pack
from miaotui.quant.bitmask import Bitmask, from_bitmask
from miaotui.quant.scheme import QuantScheme, ScaleType
from miaotui.quant.tensor import DenseTensor, DenseType, GroupedTensor, Tensor

Pieces = Mapping[str, tuple[str, NDArray[Any]]]
"""A weight's stored parts: suffix to (safetensors type, array)."""

Scale = tuple[NDArray[np.float32], ScaleType]


class Mismatch(Exception):
    """The parts of a weight do not fit together. The reader turns it into a CheckpointError."""


class Stored(Protocol):
    """What `find` needs to know of a stored tensor."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


class Layout(Protocol):
    """How one quantisation method stores its weights."""

    def find(self, entries: Mapping[str, Stored]) -> dict[str, dict[str, str]]:
        """Weight name (`X.weight`) to its parts, suffix to stored name."""
        ...

    def join(self, name: str, pieces: Pieces) -> Tensor:
        """The weight `name` (`X.weight`) that the parts are. Raises Mismatch when they do not fit together."""
        ...


def detect(config: Mapping[str, Any], folder: Path) -> Layout | None:
    """The layout that the configuration declares, or None for a model that is not quantised.

    Raises UnsupportedModelError for a method or an option that is not understood, by its name.
    """
    quantization = config.get("quantization_config")
    if quantization is None:
        old_gptq = files.beside(folder, "quantize_config.json")
        quantization = {"quant_method": "gptq", **files.read_json(old_gptq)} if old_gptq else None
    if quantization is None:
        return None
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method == "compressed-tensors" and sparsity_format(quantization) == SPARSE:
        return SparseBitmask.parse(quantization)
    layout = _LAYOUTS.get(method) if isinstance(method, str) else None
    return layout.parse(quantization) if layout else _refuse("quant_method", method)


SPARSE = "sparse-bitmask"


def sparsity_format(quantization: Mapping[str, Any]) -> str | None:
    """How a compressed-tensors configuration says that zeros are left out; None where it does not."""
    sparsity = quantization.get("sparsity_config")
    form = sparsity.get("format") if isinstance(sparsity, dict) else None
    return form if isinstance(form, str) else None


def _refuse(key: str, value: Any) -> NoReturn:
    raise UnsupportedModelError(
        f"The model's quantization_config has {key} = {str(value)[:80]!r}, which is not supported.",
        "Supported are compressed-tensors (pack-, int- and float-quantized, sparse-bitmask), GPTQ and AWQ (gemm).",
    )


def _only(where: str, given: Any, known: Iterable[str]) -> None:
    """Refuse a mapping with keys that we do not know, naming the first."""
    if not isinstance(given, dict):
        _refuse(where, given)
    for key in given:
        if key not in known:
            _refuse(f"{where}.{key[:80]}" if where else key[:80], given[key])


def _parts(entries: Mapping[str, Stored], mark: str, suffixes: Iterable[str]) -> dict[str, dict[str, str]]:
    """Every module that has a stored `X.mark`, with those of the other suffixes that it has."""
    found: dict[str, dict[str, str]] = {}
    for name in entries:
        if name.endswith(f".{mark}"):
            stem = name[: -len(mark)]
            found[f"{stem}weight"] = {s: stem + s for s in (mark, *suffixes) if stem + s in entries}
    return found


# -- checks shared by all ------------------------------------------------------------------------------------
def _integers(pieces: Pieces, name: str, rank: int, dtypes: tuple[str, ...] = ("I32",)) -> NDArray[Any]:
    if name not in pieces:
        raise Mismatch(f"its {name} is missing")
    dtype, array = pieces[name]
    if dtype not in dtypes or array.ndim != rank:
        raise Mismatch(f"its {name} is {dtype} of shape {array.shape}")
    return array


def _scale(pieces: Pieces, name: str) -> Scale:
    if name not in pieces:
        raise Mismatch(f"its {name} is missing")
    dtype, array = pieces[name]
    if dtype == "BF16":
        return DenseTensor("bfloat16", array).dense32(), "bfloat16"
    if dtype not in ("F16", "F32"):
        raise Mismatch(f"its {name} is {dtype}")
    return array.astype(np.float32), "float16" if dtype == "F16" else "float32"


def _same(what: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if shape != expected:
        raise Mismatch(f"its {what} has shape {shape}, not {expected}")


def _group_size(width: int, groups: int, stated: Iterable[int | None]) -> int | None:
    """The group size: one that the configuration states if it fits the scales' shape, else what divides evenly.

    A group wider than the row is the row.
    """
    for size in stated:
        if groups == (1 if size is None else -(-width // size)):
            return size if size is None or size <= width else None
    if groups == 1:
        return None
    if groups < 1 or width % groups:
        raise Mismatch(f"it has {groups} groups in a row of {width}")
    return width // groups


def _permutation(g_idx: NDArray[Any] | None, width: int, groups: int, size: int | None) -> NDArray[np.int32] | None:
    """The order that sorts columns by group, or None when they are sorted (or g_idx was never filled: all −1)."""
    if g_idx is None or size is None or np.all(g_idx == -1):
        return None
    _same("g_idx", g_idx.shape, (width,))
    if g_idx.min() < 0 or g_idx.max() >= groups:
        raise Mismatch("its g_idx names groups that it has not")
    expected = np.arange(width, dtype=np.int64) // size
    if np.array_equal(g_idx, expected):
        return None
    order = np.argsort(g_idx, kind="stable")
    if not np.array_equal(g_idx[order], expected):
        raise Mismatch("its g_idx makes groups of unequal size")
    return order.astype(np.int32)


# -- compressed-tensors --------------------------------------------------------------------------------------
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
        _only("", config, _TOP_KEYS)
        for key in ("transform_config", "moe_sparsity_config"):
            if config.get(key):
                _refuse(key, config[key])
        if config.get("kv_cache_scheme"):
            _check_bytes("kv_cache_scheme", config["kv_cache_scheme"], ("tensor",))
        sparsity = config.get("sparsity_config")
        if sparsity and not (isinstance(sparsity, dict) and sparsity.get("format") == "dense"):
            _refuse("sparsity_config", sparsity)
        if config.get("format") not in _FORMATS:
            _refuse("format", config["format"])
        groups = config.get("config_groups")
        if not isinstance(groups, dict):
            _refuse("config_groups", groups)
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
        found = _parts(entries, "weight_packed", extras)
        for weight, parts in _parts(entries, "weight", extras).items():
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
        packed = _integers(pieces, "weight_packed", 2)
        shape = _integers(pieces, "weight_shape", 1, ("I64", "I32")).tolist()
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
            zeros = _integers(pieces, "weight_zero_point", 2)
            _same("weight_zero_point", zeros.shape, (-(-out * bits // 32), scale.shape[1]))
        g_idx = _integers(pieces, "weight_g_idx", 1, ("I32", "I64")) if "weight_g_idx" in pieces else None
        perm = _permutation(g_idx, width, scale.shape[1], scheme.group_size)
        return pack.compressed_int4(packed, scale, zeros, scheme, width, perm)

    def _bytes(self, pieces: Pieces) -> GroupedTensor:
        """int-quantized: one int8 an element, also where the scheme has fewer bits."""
        weight = _integers(pieces, "weight", 2, ("I8",))
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
            points = _integers(pieces, "weight_zero_point", pieces["weight_scale"][1].ndim, ("I8",))
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
        weight = _integers(pieces, "weight", 2, ("F8_E4M3",))
        scale, _ = self._scales(pieces, weight.shape[0])
        _same("weight_scale", scale.shape, (weight.shape[0], 1))
        with np.errstate(invalid="ignore", over="ignore"):  # a damaged file's inf and nan stay what they are
            return DenseTensor("float32", pack.e4m3(weight) * scale)

    def _scales(self, pieces: Pieces, out: int) -> Scale:
        """weight_scale as `[out, groups]`: `[1]` (whole tensor) and `[out]` are spread out."""
        scale, kind = _scale(pieces, "weight_scale")
        if scale.ndim < 2:
            scale = scale.reshape(-1, 1)
        if scale.ndim != 2 or scale.shape[0] not in (1, out):
            raise Mismatch(f"its weight_scale has shape {scale.shape} for {out} rows")
        return np.array(np.broadcast_to(scale, (out, scale.shape[1]))), kind

    def _scheme(self, bits: int, width: int, groups: int, kind: ScaleType) -> QuantScheme:
        sizes = [scheme.group_size for scheme in self.schemes if scheme.bits == bits]
        return QuantScheme(bits, _group_size(width, groups, sizes), True, kind)


def _schemes(name: str, group: Any) -> list[QuantScheme]:
    """The weight scheme of a configuration group, checked; none when it leaves weights alone."""
    where = f"config_groups.{name[:40]}"
    _only(where, group, ("targets", "weights", "input_activations", "output_activations", "format"))
    if group.get("format") not in _FORMATS:
        _refuse(f"{where}.format", group["format"])
    if group.get("output_activations"):
        _refuse(f"{where}.output_activations", group["output_activations"])
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
        _refuse(f"config_groups.{name[:40]}.targets", targets)
    return tuple(targets)


def _names(target: str, module: str) -> bool:
    """A module's name, or a pattern for its beginning."""
    if not target.startswith("re:"):
        return target == module
    try:
        return re.match(target[3:], module) is not None
    except re.error:
        _refuse("targets", target)


def _by_token(group: dict[str, Any]) -> bool:
    """Whether inputs are coded to int8 as they come, with a scale for each token."""
    args = group.get("input_activations") or {}
    return args.get("type", "int") == "int" and bool(args.get("dynamic")) and args.get("strategy") == "token"


def _check_bytes(where: str, args: Any, strategies: tuple[str, ...]) -> None:
    """Integers or floats of 8 bits, whose scales are spread in one of these ways."""
    _only(where, args, _ARGS_KEYS)
    understood = {"num_bits": (8,), "type": (None, "int", "float"), "strategy": (None, *strategies),
                  "group_size": (None, -1), "dynamic": (None, False, True)}  # fmt: skip
    for key, values in understood.items():
        if args.get(key, values[0]) not in values:
            _refuse(f"{where}.{key}", args[key])


def _weight_scheme(where: str, args: Any) -> QuantScheme:
    _only(where, args, _ARGS_KEYS)
    bits, size, strategy = args.get("num_bits", 8), args.get("group_size"), args.get("strategy")
    if args.get("type", "int") != "int" or bits not in pack.DENSE_BITS or type(bits) is not int:
        _refuse(f"{where}.type/num_bits", f"{args.get('type', 'int')}/{bits}")
    if args.get("dynamic"):
        _refuse(f"{where}.dynamic", args["dynamic"])
    if strategy not in (None, "group", "channel", "tensor"):
        _refuse(f"{where}.strategy", strategy)
    if size is not None and (type(size) is not int or size < -1 or size == 0):
        _refuse(f"{where}.group_size", size)
    return QuantScheme(bits, size if size and size > 0 else None, bool(args.get("symmetric", True)))


# -- sparse --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class SparseBitmask:
    """compressed-tensors without its zeros: `compressed` values, the `bitmask` of where they stand, `row_offsets`."""

    @classmethod
    def parse(cls, config: dict[str, Any]) -> SparseBitmask:
        _only("", config, _TOP_KEYS)
        for key in ("config_groups", "kv_cache_scheme", "transform_config", "moe_sparsity_config"):
            if config.get(key):  # codes that are sparse too: nobody writes them any more
                _refuse(key, config[key])
        if config.get("format") not in _FORMATS:
            _refuse("format", config["format"])
        _only("sparsity_config", config["sparsity_config"], _SPARSITY_KEYS)
        return cls()

    def find(self, entries: Mapping[str, Stored]) -> dict[str, dict[str, str]]:
        return _parts(entries, "bitmask", ("compressed", "row_offsets", "shape"))

    def join(self, name: str, pieces: Pieces) -> Tensor:
        mask, offsets = _integers(pieces, "bitmask", 2, ("U8",)), _integers(pieces, "row_offsets", 1, ("I64",))
        shape = _integers(pieces, "shape", 1, ("I64",)).tolist()
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


# -- GPTQ and AWQ --------------------------------------------------------------------------------------------
def _bits_and_size(config: dict[str, Any], allowed: tuple[int, ...]) -> tuple[int, int | None]:
    bits, size = config.get("bits"), config.get("group_size", -1)
    if type(bits) is not int or bits not in allowed:
        _refuse("bits", bits)
    if type(size) is not int or (size < 1 and size != -1):
        _refuse("group_size", size)
    return bits, None if size == -1 else size


@dataclass(frozen=True)
class Gptq:
    """AutoGPTQ's and GPTQModel's `qweight`, `qzeros`, `scales`, `g_idx`."""

    bits: int
    group_size: int | None
    stored_minus_one: bool

    @classmethod
    def parse(cls, config: dict[str, Any]) -> Gptq:
        form = config.get("checkpoint_format") or "gptq"
        if form not in ("gptq", "gptq_v2") or config.get("is_marlin_format"):
            _refuse("checkpoint_format", "marlin" if config.get("is_marlin_format") else form)
        if config.get("pack_dtype") not in (None, "int32"):
            _refuse("pack_dtype", config["pack_dtype"])
        return cls(*_bits_and_size(config, pack.WORD_BITS), form == "gptq")

    def find(self, entries: Mapping[str, Stored]) -> dict[str, dict[str, str]]:
        return _parts(entries, "qweight", ("qzeros", "scales", "g_idx"))

    def join(self, name: str, pieces: Pieces) -> Tensor:
        qweight, qzeros = _integers(pieces, "qweight", 2), _integers(pieces, "qzeros", 2)
        scale, kind = _scale(pieces, "scales")
        width, out = qweight.shape[0] * 32 // self.bits, qweight.shape[1]
        if scale.ndim != 2 or out * self.bits % 32:
            raise Mismatch(f"its scales have shape {scale.shape} for {out} outputs")
        groups = scale.shape[0]
        _same("scales", scale.shape, (groups, out))
        _same("qzeros", qzeros.shape, (groups, out * self.bits // 32))
        size = _group_size(width, groups, [self.group_size])
        g_idx = _integers(pieces, "g_idx", 1, ("I32", "I64")) if "g_idx" in pieces else None
        perm = _permutation(g_idx, width, groups, size)
        scheme = QuantScheme(self.bits, size, True, kind)
        return pack.gptq(qweight, qzeros, scale, scheme, stored_minus_one=self.stored_minus_one, perm=perm)


@dataclass(frozen=True)
class Awq:
    """AutoAWQ's GEMM layout: `qweight`, `qzeros`, `scales`."""

    group_size: int | None

    @classmethod
    def parse(cls, config: dict[str, Any]) -> Awq:
        version = config.get("version", "gemm")
        if not isinstance(version, str) or version.lower() != "gemm":
            _refuse("version", version)
        return cls(_bits_and_size(config, (4,))[1])

    def find(self, entries: Mapping[str, Stored]) -> dict[str, dict[str, str]]:
        return _parts(entries, "qweight", ("qzeros", "scales"))

    def join(self, name: str, pieces: Pieces) -> Tensor:
        qweight, qzeros = _integers(pieces, "qweight", 2), _integers(pieces, "qzeros", 2)
        scale, kind = _scale(pieces, "scales")
        width, out = qweight.shape[0], qweight.shape[1] * 8
        if scale.ndim != 2:
            raise Mismatch(f"its scales have shape {scale.shape}")
        groups = scale.shape[0]
        _same("scales", scale.shape, (groups, out))
        _same("qzeros", qzeros.shape, (groups, out // 8))
        scheme = QuantScheme(4, _group_size(width, groups, [self.group_size]), True, kind)
        return pack.awq(qweight, qzeros, scale, scheme)


_LAYOUTS: dict[str, type[CompressedTensors] | type[Gptq] | type[Awq]] = {
    "compressed-tensors": CompressedTensors,
    "gptq": Gptq,
    "awq": Awq,
}
