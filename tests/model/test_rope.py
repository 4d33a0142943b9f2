"""Rotary frequencies against transformers' own functions, with the parameters of real models."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from miaotui.errors import CheckpointError
from miaotui.model import rope

torch = pytest.importorskip("torch", reason="the reference figures come from transformers")
transformers = pytest.importorskip("transformers", reason="the reference figures come from transformers")

LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "original_max_position_embeddings": 4096,
    "short_factor": [1.0 + 0.01 * i for i in range(48)],
    "long_factor": [1.0 + 1.3 * i for i in range(48)],
}
CASES = [
    ("llama3.1", 128, 131072, 131072, {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
     "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}),
    ("llama3.2", 64, 131072, 131072, {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0,
     "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}),
    ("qwen2.5-yarn", 128, 32768, 131072, {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0,
     "original_max_position_embeddings": 32768}),
    ("yarn-all", 64, 4096, 16384, {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "beta_fast": 16,
     "beta_slow": 2, "mscale": 0.7, "mscale_all_dim": 1.2, "truncate": False}),
    ("linear", 128, 4096, 8192, {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}),
    ("dynamic-within", 128, 4096, 4096, {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}),
    ("dynamic-beyond", 128, 4096, 10000, {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}),
    ("phi3.5-long", 96, 131072, 131072, LONG),
    ("phi3.5-short", 96, 131072, 4096, LONG),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "dim", "limit", "length", "parameters"), CASES, ids=lambda x: x if isinstance(x, str) else ""
)
def test_frequencies_equal_those_of_transformers(
    name: str, dim: int, limit: int, length: int, parameters: dict[str, Any]
) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = transformers.LlamaConfig(
        hidden_size=dim * 2, num_attention_heads=2, max_position_embeddings=limit, rope_parameters=dict(parameters)
    )
    theirs, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, torch.device("cpu"), seq_len=length)
    ours = rope.make(parameters, dim, max_position=limit, length=length)
    np.testing.assert_allclose(ours.inv_freq, theirs.numpy(), rtol=3e-7)
    assert ours.factor == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize(
    ("parameters", "limit", "wanted", "length"),
    [
        ({}, 4096, None, 4096),
        ({}, 4096, 100, 100),
        ({}, 4096, 9999, 4096),
        ({"rope_type": "linear", "factor": 2.0}, 4096, None, 8192),
        ({"rope_type": "dynamic", "factor": 4.0}, 4096, None, 4096),
        ({"rope_type": "dynamic", "factor": 4.0}, 4096, 99999, 16384),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 32768, None, 131072),
        ({"type": "su"}, 131072, None, 131072),
    ],
)
def test_how_far_a_scaling_reaches(parameters: dict[str, Any], limit: int, wanted: int | None, length: int) -> None:
    assert rope.context(parameters, limit, wanted) == length


def test_the_wrong_number_of_factors_is_an_error() -> None:
    with pytest.raises(CheckpointError, match="incomplete"):
        rope.make(LONG, 64, max_position=131072, length=4096)
