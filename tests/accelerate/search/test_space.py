"""What can be tried, what the original is, and what the ceiling model makes of both."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from miaotui.accelerate.goals import Goal, Workload, fitted
from miaotui.accelerate.search.predict import Predictor
from miaotui.accelerate.search.space import LOOKED_AT, ORIGINAL, RECODED, Candidate, Serving, Space, make_space
from miaotui.accelerate.source import Source, examine, grid_of, origin
from miaotui.checkpoint import open_checkpoint
from miaotui.compress.recipe import Calibration, Recipe
from miaotui.hardware.ceilings import Ceilings
from miaotui.hardware.detect import Machine
from tests.measure.test_work import make_spec

LIMITS = Ceilings(2, 1 << 20, 1e10, 1e12, 2e11)


def source(**changes: object) -> Source:
    made = Source(make_spec(), "safetensors", 1_000_000, (64, 128), "bfloat16")
    return replace(made, **changes)  # type: ignore[arg-type]


AVX2 = ("avx2", "fma", "f16c")
VNNI = (*AVX2, "avx_vnni")


def space(of: Source, budget: float = 900.0, goal: Goal = "latency", isa: tuple[str, ...] = VNNI) -> Space:
    machine = Machine("A CPU", "x86_64", isa, 2, 2, None, {}, 1, 8 << 30, "Linux", ())
    return make_space(of, goal, machine, Calibration(), budget)


def schemes(found: Space) -> set[str]:
    return {c.features()["scheme"] for c in found.weights}


def test_groups_that_do_not_divide_rows_are_dropped_with_the_reason() -> None:
    found = space(source(widths=(64, 96)))
    assert "w4g64-sym" not in schemes(found)
    assert "w4g32-sym" in schemes(found)
    assert dict(found.dropped)["w4g64-sym"].startswith("its groups do not divide rows of 96")


def test_a_gguf_file_becomes_gguf() -> None:
    found = space(source(format="gguf", stored="Q8_0"))
    assert {c.features()["format"] for c in found.weights} == {"gguf"}
    assert schemes(found) == {"w4g32-sym", "w4g32-asym", "w8g32-sym"}
    assert "plain numbers" in dict(found.dropped)["fewer layers"]


def test_no_two_candidates_are_the_same() -> None:
    found = space(source())
    assert len({c.key for c in found.weights}) == len(found.weights)
    assert len({c.name for c in found.weights}) == len(found.weights)
    assert len(set(found.servings)) == len(found.servings)
    assert Serving() not in found.servings


def test_what_changes_most_of_the_work_is_tried_first() -> None:
    first = space(source(), goal="throughput").servings[:2]
    assert first == (Serving("int8-batch"), Serving(kv_cache_dtype="int8"))
    assert all(serving.compute == "auto" for serving in space(source(), goal="memory").servings)


def test_codes_of_8_bits_are_not_tried_where_those_of_4_are_faster() -> None:
    found = space(source(), goal="throughput", isa=AVX2)
    assert all(serving.compute == "auto" for serving in found.servings)
    assert "twice as fast" in dict(found.dropped)[RECODED]
    assert RECODED not in dict(space(source(), goal="memory", isa=AVX2).dropped)
    assert RECODED not in dict(space(source(), goal="throughput").dropped)


def test_memory_alone_may_cost_the_screen() -> None:
    for goal in ("latency", "throughput", "balanced", "memory"):
        found = space(source(), goal=goal)
        ways = [*found.servings, *(candidate.serving for candidate in found.weights)]
        assert {way.greedy_screen for way in ways} == {goal != "memory"}
    assert Serving(greedy_screen=False) in space(source(), goal="memory").servings  # of the original's weights
    predictor = Predictor(source(weight_bytes=2 * 10**6), LIMITS)
    assert predictor.gain("memory", ORIGINAL.served(greedy_screen=False)) > 1.0


def test_what_gives_the_same_answers() -> None:
    recipe = Recipe()
    assert Candidate(recipe).answers_key == Candidate(recipe, Serving(threads=1, speculative="ngram")).answers_key
    assert Candidate(recipe).answers_key != Candidate(recipe, Serving(kv_cache_dtype="int8")).answers_key
    assert Candidate(recipe).answers_key != Candidate(recipe, blocks=3).answers_key
    assert Candidate(recipe).key != Candidate(recipe, Serving(threads=1)).key


def test_layers_go_only_with_time_and_layers_to_spare() -> None:
    spec = make_spec()
    deep = source(spec=replace(spec, layers=spec.layers * 15))
    count = len(deep.spec.layers)
    for name in ("gguf", "compressed-tensors"):
        found = [c for c in space(deep).weights if c.features()["format"] == name]
        assert {c.blocks for c in found} == {None, count - 1, count - 2, count - 4}
    assert {c.blocks for c in space(deep, 120.0).weights} == {None}
    assert {c.blocks for c in space(source()).weights} == {None}
    assert "8m" in dict(space(deep, 120.0).dropped)["fewer layers"]
    file = source(spec=deep.spec, format="gguf")
    assert {c.blocks for c in space(file).weights} == {None}
    assert "folders" in dict(space(file).dropped)["fewer layers"]


# -- the original ----------------------------------------------------------------------------------------
def test_weights_that_were_int4_once_are_known() -> None:
    random = np.random.default_rng(0)
    codes = random.integers(0, 16, (64, 4, 32)).astype(np.float32)
    scale, low = random.random((64, 4, 1), np.float32), random.random((64, 4, 1), np.float32)
    assert grid_of((codes * scale + low).reshape(64, 128)) == 32
    assert grid_of(random.standard_normal((64, 128)).astype(np.float32)) is None
    told = replace(source(), grid=32).caveat
    assert told is not None
    assert "at most 16 values in each group of 32" in told
    assert source().caveat is None


def test_the_demo_was_int4_once(demo_gguf: Path) -> None:
    found = examine(open_checkpoint(demo_gguf), LOOKED_AT)
    assert found.grid == 32
    assert found.rounding["w4g32-asym free"] < 1e-4 < found.rounding["w4g32-asym"]


def test_license_and_base_model(tmp_path: Path) -> None:
    class Asset:
        format = "safetensors"

        def asset(self, name: str) -> Path:
            return tmp_path / name

    (tmp_path / "README.md").write_text("---\nlicense: mit\nbase_model: a/b\nlanguage: en\n---\n# Title\n")
    assert origin(Asset()) == {"license": "mit", "base_model": "a/b"}  # type: ignore[arg-type]
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    assert origin(Asset()) == {}  # type: ignore[arg-type]
    (tmp_path / "README.md").write_text("# Title\n---\nlicense: mit\n---\n")
    assert origin(Asset()) == {}  # type: ignore[arg-type]


# -- the ceiling model -----------------------------------------------------------------------------------
def test_fewer_bytes_promise_more() -> None:
    predictor = Predictor(source(weight_bytes=2 * 10**6), LIMITS)
    gains = [predictor.gain("memory", Candidate(Recipe(scheme=s))) for s in ("w8-sym", "w4g32-sym", "w4g128-sym")]
    assert sorted(gains) == gains
    assert predictor.gain("latency", ORIGINAL) == predictor.gain("balanced", ORIGINAL) == 1.0
    cut = Candidate(Recipe(scheme="w8-sym"), blocks=1)
    assert predictor.weight_bytes(cut) < predictor.weight_bytes(Candidate(Recipe(scheme="w8-sym")))


def test_a_head_that_is_not_coded_is_multiplied_in_float32() -> None:
    limits = replace(LIMITS, bandwidth=1e15)
    predictor = Predictor(source(weight_bytes=2 * 10**6), limits)
    kept, coded = (
        predictor.figures(Candidate(Recipe(scheme="w4g32-sym", embedding=table, head=table)))["streams"]
        for table in ("keep", "w8-sym")
    )
    spec = predictor.source.spec
    operations = 2 * spec.vocab_size * spec.hidden_size
    assert kept - coded >= operations * (1 / limits.fp32 - 1 / limits.int8)


def test_a_slow_original_is_timed_by_less() -> None:
    assert fitted(lambda load: 1.0, 2.0, 4096) == Workload()
    less = fitted(lambda load: load.answer / 64, 1.0, 4096)
    assert less == Workload(256, 64, 32, 32, 16)
    assert fitted(lambda load: 1.0, 2.0, 300).longest <= 320
    assert fitted(lambda load: 1e9, 1.0, 4096) == Workload(64, 16, 8, 16, 8)
