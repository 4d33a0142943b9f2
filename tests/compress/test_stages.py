"""Rounding in stages against the definition: every group for the inputs that it has, towards what the original gave."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch

from miaotui.checkpoint import open_checkpoint
from miaotui.compress import hidden as streams
from miaotui.compress.hidden import Hidden
from miaotui.compress.layers import read_layer, run_layer
from miaotui.compress.options import steps_of
from miaotui.compress.places import Model
from miaotui.compress.recipe import Recipe, parse_scheme
from miaotui.compress.solve import round_layer
from miaotui.compress.stages import STAGES, Pass, round_in_stages
from miaotui.compress.statistics import Gathering
from miaotui.compress.types import Layer
from miaotui.model.families import read_spec
from tests.compress.toys import toy_case, write_original

SCHEME = parse_scheme("w3g32-sym")
FAMILIES = ["llama-bias", "granite", "gemma2", "qwen3-moe", "starcoder2"]


class Case:
    """The second layer of a toy, and streams into it: the original's, and one that earlier layers have disturbed."""

    def __init__(self, name: str, folder: Path) -> None:
        checkpoint = open_checkpoint(write_original(toy_case(name), folder))
        self.model = Model(checkpoint, *read_spec(checkpoint))
        self.spec = self.model.spec
        self.exact = read_layer(self.model, 1)
        g = torch.Generator().manual_seed(3)
        mixing = torch.randn(self.spec.hidden_size, self.spec.hidden_size, generator=g) * 0.03
        x = torch.randn(40, 24, self.spec.hidden_size, generator=g) @ (torch.eye(self.spec.hidden_size) + mixing * 3)
        self.original = self._stream(folder, "original", x)
        self.solved = self._stream(folder, "solved", x + x @ mixing + 0.05 * torch.randn(x.shape, generator=g))

    def _stream(self, folder: Path, name: str, values: torch.Tensor) -> Hidden:
        made = streams.at(folder, name, 1, tuple(values.shape))  # type: ignore[arg-type]
        made.create()
        made.write(slice(0, len(values)), values)
        return made

    def layer(self) -> Layer:
        """To be rounded, with statistics of the solved stream."""
        layer = read_layer(self.model, 1, lambda place: SCHEME)
        gathering = Gathering()
        run_layer(self.spec, layer, self.solved.all(), listen=gathering)
        found = gathering.finish("here").inputs
        for key, group in layer.groups.items():
            group.statistics = found.get(key)
        return layer

    def way(self, **changes: Any) -> Pass:
        return replace(Pass(self.spec, self.original, self.solved, torch.float32, {}), **changes)

    def off(self, layer: Layer) -> float:
        """‖solved − original‖² after the layer."""
        after = run_layer(self.spec, layer, self.solved.all())
        return float((after - run_layer(self.spec, self.exact, self.original.all())).square().sum())


def steps(case: Case) -> Any:
    return steps_of(Recipe.parse({"scheme": "w3g32-sym", "method": "gptq", "propagate": True}), case.spec)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_stream_comes_nearer_to_the_original_s(name: str, tmp_path: Path) -> None:
    case = Case(name, tmp_path)
    plain, staged = case.layer(), case.layer()
    round_layer(plain, steps(case))
    rounded = round_in_stages(staged, steps(case), case.way())
    assert rounded.keys() == staged.groups.keys()
    for key, group in staged.groups.items():
        for weight, one in zip(group.weights, rounded[key].rounded, strict=True):
            assert one is not None
            assert torch.equal(weight, one.values)
    assert case.off(staged) < (0.97 if name == "gemma2" else 0.9) * case.off(plain)  # norms stand before its stream


def test_each_group_is_rounded_for_the_inputs_that_it_then_has(tmp_path: Path) -> None:
    case = Case("llama-bias", tmp_path)
    layer = case.layer()
    round_in_stages(layer, steps(case), case.way())
    again = Gathering()
    run_layer(case.spec, layer, case.solved.all(), listen=again)
    for key, found in again.finish("here").inputs.items():
        mine = layer.groups[key].statistics
        assert mine is not None
        torch.testing.assert_close(mine.moment, found.moment, rtol=1e-3, atol=1e-1)


def test_with_many_bits_only_what_a_linear_can_make_good_is_made_good(tmp_path: Path) -> None:
    """At 8 bits what is left is the part of the disturbance that no linear map of the inputs can undo."""
    case = Case("llama-bias", tmp_path)
    layer = read_layer(case.model, 1, lambda place: parse_scheme("w8g32-sym"))
    for key, group in case.layer().groups.items():
        layer.groups[key].statistics = group.statistics
    untouched = case.off(case.exact)
    round_in_stages(layer, steps(case), case.way())
    assert case.off(layer) < 0.5 * untouched


def test_kept_linears_stay_and_coded_inputs_count(tmp_path: Path) -> None:
    case = Case("llama-bias", tmp_path)
    layer = case.layer()
    layer.groups["qkv"].schemes = (layer.groups["qkv"].schemes[0], parse_scheme("keep"), parse_scheme("keep"))
    layer.groups["out"].schemes = (parse_scheme("keep"),)
    coarse = {key: lambda x: torch.round(x * 2) / 2 for key in STAGES}
    rounded = round_in_stages(layer, steps(case), case.way(inputs=coarse))
    assert torch.equal(layer.groups["qkv"].weights[1], case.exact.groups["qkv"].weights[1])
    assert torch.equal(layer.groups["out"].weights[0], case.exact.groups["out"].weights[0])
    assert rounded["out"].rounded == [None]
    codes = case.layer()
    plain = round_in_stages(codes, steps(case), case.way())
    assert rounded["mlp_in"].rounded[0] is not None
    assert plain["mlp_in"].rounded[0] is not None
    assert (rounded["mlp_in"].rounded[0].values != plain["mlp_in"].rounded[0].values).any()


def test_the_same_streams_change_nothing_before_rounding(tmp_path: Path) -> None:
    """The first layer's queries, keys and values have the original's own inputs."""
    case = Case("llama-bias", tmp_path)
    layer = case.layer()
    rounded = round_in_stages(layer, steps(case), case.way(original=case.solved))
    for exact, mine in zip(case.exact.groups["qkv"].weights, rounded["qkv"].exact, strict=True):
        torch.testing.assert_close(mine, exact, atol=1e-4, rtol=1e-3)
