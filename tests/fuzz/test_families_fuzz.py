"""Damaged configurations end in one typed error or a sound spec, never in a crash or a huge allocation."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from miaotui.errors import MiaotuiError
from miaotui.model import rope
from miaotui.model.families import FAMILIES, describe, hf
from miaotui.model.families.gguf import KEYS
from miaotui.model.families.spec import make_spec
from miaotui.model.families.table import COMMON_KEYS, Family
from miaotui.quant.tensor import DenseTensor, Tensor
from tests.model.test_families import LLAMA

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 70), st.integers(), st.floats(), st.text(max_size=5),
    st.sampled_from(["linear", "dynamic", "yarn", "longrope", "llama3", "gelu", "sliding_attention", 1e300, 2**24]),
)  # fmt: skip
ROPE_KEYS = st.sampled_from(sorted(rope.COMMON.union(*rope.PARAMETERS.values())))
VALUES = st.one_of(
    SCALARS,
    st.lists(SCALARS, max_size=4),
    st.dictionaries(ROPE_KEYS, st.one_of(SCALARS, st.lists(SCALARS)), max_size=6),
)


@settings(max_examples=600, deadline=None)
@given(st.sampled_from(FAMILIES), st.data())
def test_config_json(family: Family, data: st.DataObject) -> None:
    keys = st.sampled_from(sorted(COMMON_KEYS | family.keys))
    change = data.draw(st.dictionaries(keys, VALUES, min_size=1, max_size=4))
    config = {**LLAMA, "head_dim": 16, "architectures": list(family.architectures[:1]), **change}
    try:
        spec = make_spec(hf.describe(config), data.draw(st.one_of(st.none(), st.integers(1, 9999))))
    except MiaotuiError:
        return
    assert 1 <= spec.max_position <= 1 << 24
    for layer in spec.layers:
        turn = layer.attention.rope
        assert turn is None or np.isfinite(turn.inv_freq).all()


class File:
    """A GGUF checkpoint in memory, all zeros."""

    path, format, nbytes = Path("x.gguf"), "gguf", 0

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config

    def names(self) -> list[str]:
        return ["token_embd.weight"]

    def tensor(self, name: str) -> Tensor:
        return DenseTensor("float32", np.zeros((100, 64), np.float32))

    def asset(self, filename: str) -> Path | None:
        return None

    def fingerprint(self) -> str:
        return ""


@settings(max_examples=400, deadline=None)
@given(st.sampled_from([family for family in FAMILIES if family.gguf]), st.data())
def test_gguf_metadata(family: Family, data: st.DataObject) -> None:
    arrays = st.lists(st.integers(-1, 9), max_size=3).map(np.array)
    keys = st.sampled_from([*KEYS, "rope.scaling.type", "rope.scaling.factor", "rope.freq_base_swa", "other"])
    change = data.draw(st.dictionaries(keys, st.one_of(SCALARS, arrays), min_size=1, max_size=4))
    base = {"block_count": 2, "context_length": 512, "embedding_length": 64, "feed_forward_length": 96}
    metadata = {"attention.head_count": 4, "attention.layer_norm_rms_epsilon": 1e-5, **base, **change}
    config = {f"{family.gguf}.{key}": value for key, value in metadata.items()}
    with contextlib.suppress(MiaotuiError):
        make_spec(describe(File({"general.architecture": family.gguf, **config})), None)
