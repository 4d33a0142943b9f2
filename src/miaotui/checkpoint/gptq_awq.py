"""AutoGPTQ's and AutoAWQ's words of 4 (or 2, 3, 8) bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from miaotui.checkpoint.layout import (
    Mismatch,
    Pieces,
    Stored,
    find_parts,
    fit_group_size,
    integers,
    read_scale,
    refuse,
    same_shape,
    sort_by_group,
)
from miaotui.quant import pack
from miaotui.quant.scheme import QuantScheme
from miaotui.quant.tensor import Tensor


def _bits_and_size(config: dict[str, Any], allowed: tuple[int, ...]) -> tuple[int, int | None]:
    bits, size = config.get("bits"), config.get("group_size", -1)
    if type(bits) is not int or bits not in allowed:
        refuse("bits", bits)
    if type(size) is not int or (size < 1 and size != -1):
        refuse("group_size", size)
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
            refuse("checkpoint_format", "marlin" if config.get("is_marlin_format") else form)
        if config.get("pack_dtype") not in (None, "int32"):
            refuse("pack_dtype", config["pack_dtype"])
        return cls(*_bits_and_size(config, pack.WORD_BITS), form == "gptq")

    def find(self, entries: Mapping[str, Stored]) -> dict[str, dict[str, str]]:
        return find_parts(entries, "qweight", ("qzeros", "scales", "g_idx"))

    def join(self, name: str, pieces: Pieces) -> Tensor:
        qweight, qzeros = integers(pieces, "qweight", 2), integers(pieces, "qzeros", 2)
        scale, kind = read_scale(pieces, "scales")
        width, out = qweight.shape[0] * 32 // self.bits, qweight.shape[1]
        if scale.ndim != 2 or out * self.bits % 32:
            raise Mismatch(f"its scales have shape {scale.shape} for {out} outputs")
        groups = scale.shape[0]
        same_shape("scales", scale.shape, (groups, out))
        same_shape("qzeros", qzeros.shape, (groups, out * self.bits // 32))
        size = fit_group_size(width, groups, [self.group_size])
        g_idx = integers(pieces, "g_idx", 1, ("I32", "I64")) if "g_idx" in pieces else None
        perm = sort_by_group(g_idx, width, groups, size)
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
            refuse("version", version)
        return cls(_bits_and_size(config, (4,))[1])

    def find(self, entries: Mapping[str, Stored]) -> dict[str, dict[str, str]]:
        return find_parts(entries, "qweight", ("qzeros", "scales"))

    def join(self, name: str, pieces: Pieces) -> Tensor:
        qweight, qzeros = integers(pieces, "qweight", 2), integers(pieces, "qzeros", 2)
        scale, kind = read_scale(pieces, "scales")
        width, out = qweight.shape[0], qweight.shape[1] * 8
        if scale.ndim != 2:
            raise Mismatch(f"its scales have shape {scale.shape}")
        groups = scale.shape[0]
        same_shape("scales", scale.shape, (groups, out))
        same_shape("qzeros", qzeros.shape, (groups, out // 8))
        scheme = QuantScheme(4, fit_group_size(width, groups, [self.group_size]), True, kind)
        return pack.awq(qweight, qzeros, scale, scheme)
