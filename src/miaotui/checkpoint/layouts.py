"""Quantised layouts in safetensors: which stored tensors make up one weight, and what they mean together.

compressed-tensors (pack-quantized, int-quantized, float-quantized, sparse-bitmask), GPTQ (v1, v2) and AWQ (GEMM). What
a module is made of is told by the tensors that are there and their shapes; the configuration is checked for anything
that would change the mathematics and is not understood.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from miaotui.checkpoint import files
from miaotui.checkpoint.compressed_tensors import CompressedTensors, SparseBitmask
from miaotui.checkpoint.gptq_awq import Awq, Gptq
from miaotui.checkpoint.layout import Layout, refuse


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
    return layout.parse(quantization) if layout else refuse("quant_method", method)


SPARSE = "sparse-bitmask"


def sparsity_format(quantization: Mapping[str, Any]) -> str | None:
    """How a compressed-tensors configuration says that zeros are left out; None where it does not."""
    sparsity = quantization.get("sparsity_config")
    form = sparsity.get("format") if isinstance(sparsity, dict) else None
    return form if isinstance(form, str) else None


_LAYOUTS: dict[str, type[CompressedTensors] | type[Gptq] | type[Awq]] = {
    "compressed-tensors": CompressedTensors,
    "gptq": Gptq,
    "awq": Awq,
}
