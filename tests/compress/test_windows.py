"""Windows against transformers, for every family: the same logits, and what linears are told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="compression needs PyTorch")
pytest.importorskip("transformers", reason="the tiny models come from transformers")

import torch

from miaotui.checkpoint import open_checkpoint
from miaotui.compress.layers import layer_weights, read_layer, run_layer
from miaotui.compress.places import Model
from miaotui.compress.windows import WindowOps
from miaotui.model.decoder import forward
from miaotui.model.families import read_spec
from miaotui.model.weights import prepare_weights
from tests.golden import models

LENGTH = 19


def read(case: models.Case, folder: Path) -> Model:
    checkpoint = open_checkpoint(folder)
    return Model(checkpoint, *read_spec(checkpoint, case.length))


@pytest.mark.parametrize("case", models.CASES, ids=lambda case: case.name)
def test_logits_are_those_of_transformers(case: models.Case, tmp_path: Path) -> None:
    theirs = models.make(case)
    theirs.save_pretrained(tmp_path / "m")
    ours = read(case, tmp_path / "m")
    length = case.length
    tokens = torch.randint(3, models.VOCAB, (2, length), generator=torch.Generator().manual_seed(1))
    ops = WindowOps(length, tokens=tokens)
    weights = prepare_weights(ops, ours.spec, ours.names, ours.checkpoint)
    with torch.no_grad():
        wanted = theirs(tokens).logits.flatten(0, 1)
        found = forward(ops, ours.spec, weights)
        own = [layer_weights(ours.spec, read_layer(ours, i)) for i in range(len(ours.spec.layers))]
        layered = forward(WindowOps(length, tokens=tokens), ours.spec, replace(weights, layers=tuple(own)))
    np.testing.assert_allclose(found.numpy(), wanted.numpy(), atol=1e-4)
    np.testing.assert_allclose(layered.numpy(), found.numpy(), atol=1e-5)


def test_listening_tells_every_linear_and_the_cache(tmp_path: Path) -> None:
    case = next(case for case in models.CASES if case.name == "llama-bias")
    models.make(case).save_pretrained(tmp_path / "m")
    ours = read(case, tmp_path / "m")
    layer = read_layer(ours, 1)
    told: dict[str, torch.Tensor] = {}
    hidden = torch.randn(2, LENGTH, ours.spec.hidden_size)
    run_layer(ours.spec, layer, hidden, listen=lambda key, x: told.setdefault(key, x))
    a = layer.spec.attention
    widths = {key: x.shape for key, x in told.items()}
    rows = 2 * LENGTH
    assert widths == {
        "qkv": (rows, ours.spec.hidden_size),
        "keys.1": (rows, a.kv_heads * a.head_dim),
        "values.1": (rows, a.kv_heads * a.head_dim),
        "out": (rows, a.heads * a.head_dim),
        "mlp_in": (rows, ours.spec.hidden_size),
        "mlp_out": (rows, ours.spec.intermediate_size),
    }


def test_inputs_are_coded_where_asked(tmp_path: Path) -> None:
    case = models.CASES[0]
    models.make(case).save_pretrained(tmp_path / "m")
    ours = read(case, tmp_path / "m")
    layer, hidden = read_layer(ours, 0), torch.randn(1, LENGTH, ours.spec.hidden_size)
    plain = run_layer(ours.spec, layer, hidden)
    same = run_layer(ours.spec, layer, hidden, inputs={"mlp_in": lambda x: x})
    coarse = run_layer(ours.spec, layer, hidden, inputs={"mlp_in": lambda x: (x * 4).round() / 4})
    assert torch.equal(plain, same)
    assert not torch.equal(plain, coarse)


def test_gradients_reach_every_weight(tmp_path: Path) -> None:
    case = next(case for case in models.CASES if case.name == "gemma3")
    models.make(case).save_pretrained(tmp_path / "m")
    ours = read(case, tmp_path / "m")
    layer = read_layer(ours, 0)
    weights = [weight.requires_grad_() for group in layer.groups.values() for weight in group.weights]
    run_layer(ours.spec, layer, torch.randn(2, LENGTH, ours.spec.hidden_size)).square().mean().backward()
    assert len(weights) == 7
    assert all(weight.grad is not None and bool(weight.grad.abs().sum() > 0) for weight in weights)
