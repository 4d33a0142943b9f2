"""What `load` refuses before it reads any weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from miaotui.errors import ModelNotFoundError, UsageError
from miaotui.model.build import build, load
from tests.model.test_families import LLAMA
from tests.model.test_families_weights import Folder, whole


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"device": "abacus"}, "abacus"),
        ({"kv_cache_dtype": "int3"}, "int3"),
        ({"compute": "half"}, "half"),
        ({"max_model_len": 0}, "max_model_len"),
        ({"max_model_len": 513}, "512 positions"),
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"max_num_batched_tokens": -1}, "max_num_batched_tokens"),
        ({"threads": 0}, "threads"),
    ],
)
def test_a_wrong_option_is_named(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=named) as caught:
        build(Folder(whole(), config=LLAMA), **wrong)
    assert caught.value.hint


def test_a_model_that_is_nowhere(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        load(str(tmp_path / "nothing.gguf"))
