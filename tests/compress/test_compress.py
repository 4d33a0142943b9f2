"""`compress` from end to end: whatever the recipe, what is written answers as its error allows, or is refused early."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

from miaotui import LLM
from miaotui.checkpoint import open_checkpoint
from miaotui.compress.calibrate import FinalNorm
from miaotui.compress.layers import read_layer, read_matrix, run_layer
from miaotui.compress.places import Model
from miaotui.compress.progress import Progress
from miaotui.compress.recipe import Recipe
from miaotui.compress.run import compress
from miaotui.errors import MiaotuiError, UsageError
from miaotui.model.families import read_spec
from tests.compress import toy_folders
from tests.compress.test_calibrate import words
from tests.compress.toys import toy_case, write_original


@pytest.fixture
def original(tmp_path: Path) -> Path:
    return toy_folders.write(tmp_path / "toy", toy_folders.draw(toy_folders.CONFIG, 1))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return words(tmp_path / "words.txt")


def recipe(source: Path, **values: Any) -> Recipe:
    calibration = {"source": str(source), "windows": 16, "window": 16, "precision": "fp32"}
    return Recipe.parse({"scheme": "w8g16-sym", "scale_type": "float32", **values, "calibration": calibration})


def logits(folder: Path) -> np.ndarray[Any, Any]:
    """Of 40 tokens, by the decoder in float32: hidden states after all layers, times the head."""
    checkpoint = open_checkpoint(folder)
    model = Model(checkpoint, *read_spec(checkpoint))
    spec = model.spec
    tokens = torch.arange(40)[None] * 7 % spec.vocab_size
    hidden = read_matrix(model, "embedding")[tokens] * spec.embedding_scale
    for index in range(len(spec.layers)):
        hidden = run_layer(spec, read_layer(model, index), hidden)
    return np.asarray((FinalNorm(model)(hidden) @ read_matrix(model, "head").T)[0])


def difference(one: Path, other: Path) -> float:
    """‖a − b‖ / ‖a‖ of the logits."""
    a, b = logits(one), logits(other)
    return float(np.linalg.norm(a - b) / np.linalg.norm(a))


METHODS: list[dict[str, Any]] = [
    {"method": "rtn"},
    {"method": "rtn", "options": {"rtn": {"fit": "output"}}},
    {"method": "gptq"},
    {"method": "hqq"},
    {"method": "awq"},
    {"method": "awq+gptq"},
    {"method": "smooth+gptq", "options": {"smooth": {"everywhere": True}}},
    {"method": "rotate+gptq"},
    {"method": "rotate+awq+gptq"},
    {"method": "gptq", "propagate": True},
    {"method": "rotate+smooth+gptq", "propagate": True},
    {"method": "gptq+qat", "options": {"qat": {"steps": 3, "batch": 2}}},
    {"method": "rotate+awq+gptq+qat", "propagate": True, "options": {"qat": {"steps": 3, "batch": 2}}},
    {"method": "awq+gptq+scales", "options": {"scales": {"epochs": 1, "batch": 8}}},
    {"method": "rotate+rtn+qat+scales", "options": {"qat": {"steps": 1}, "scales": {"epochs": 1, "batch": 8}}},
    {"method": "gptq", "scheme": "w8g16-asym"},
    {"method": "gptq", "embedding": "w8-sym", "head": "w8-sym"},
    {"method": "rotate+gptq", "embedding": "w8-sym", "head": "w8-sym"},
    {"method": "gptq", "scheme": "w8-sym", "kv_cache": "int8"},
]


@pytest.mark.parametrize("values", METHODS, ids=lambda v: "-".join(str(x) for x in v.values())[:50])
def test_eight_bits_hardly_change_an_answer(
    values: dict[str, Any], original: Path, source: Path, tmp_path: Path
) -> None:
    """Whatever is folded, rotated, trained or coded: the function stays."""
    report = compress(str(original), recipe(source, **values), tmp_path / "out", cache=tmp_path / "cache")
    assert difference(original, report.path) < 0.05
    assert not list(tmp_path.glob(".out*"))
    assert Recipe.read(report.path) == recipe(source, **values)


@pytest.mark.parametrize("method", ["rotate+gptq", "awq+gptq", "smooth", "gptq+qat"])
def test_linears_that_are_kept_take_part_in_what_is_folded(
    method: str, original: Path, source: Path, tmp_path: Path
) -> None:
    values = {
        "method": method,
        "overrides": [{"match": "*.layers.1.*", "scheme": "keep"}, {"match": "*.o_proj", "scheme": "keep"}],
    }
    report = compress(str(original), recipe(source, **values), tmp_path / "out", cache=tmp_path / "cache")
    assert difference(original, report.path) < 0.05
    checkpoint = open_checkpoint(report.path)
    assert type(checkpoint.tensor("model.layers.1.mlp.up_proj.weight")).__name__ == "DenseTensor"
    assert type(checkpoint.tensor("model.layers.0.mlp.up_proj.weight")).__name__ != "DenseTensor"


FAMILIES = ["llama-bias", "qwen3", "qwen3-moe", "gemma2", "gemma3", "phi3", "granite", "olmo2", "starcoder2"]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_kind_of_family(name: str, tmp_path: Path) -> None:
    """What AWQ folds costs nothing: the error stays that of rounding alone. Families without norms before their
    linears have nothing to fold into, and are refused.
    """
    folder = write_original(toy_case(name), tmp_path)
    source = _ids(tmp_path, folder)
    plain, solved, folded = (recipe(source, method=m, scheme="w8g32-sym") for m in ("rtn", "gptq", "awq"))
    rounded = compress(str(folder), plain, tmp_path / "rtn", cache=tmp_path / "c")
    assert difference(folder, compress(str(folder), solved, tmp_path / "gptq", cache=tmp_path / "c").path) < 0.15
    if name == "olmo2":
        with pytest.raises(UsageError, match="has no norms before"):
            compress(str(folder), folded, tmp_path / "out", cache=tmp_path / "c")
        return
    report = compress(str(folder), folded, tmp_path / "out", cache=tmp_path / "c")
    assert difference(folder, report.path) < 1.3 * difference(folder, rounded.path)


def _ids(tmp_path: Path, folder: Path) -> Path:
    checkpoint = open_checkpoint(folder)
    count = read_spec(checkpoint)[0].vocab_size
    toy_folders.write_tokenizer(folder, {f"w{i}": i for i in range(min(count, 90))})
    return words(tmp_path / "words.txt", 2000)


def test_four_bits_gptq_is_closer_than_rtn(original: Path, source: Path, tmp_path: Path) -> None:
    found = {}
    for method in ("rtn", "gptq"):
        report = compress(
            str(original),
            recipe(source, method=method, scheme="w4g16-sym"),
            tmp_path / method,
            cache=tmp_path / "cache",
        )
        errors = [error for layer in report.errors.values() for error in layer.values()]
        found[method] = sum(errors) / len(errors)
    assert found["gptq"] < 0.9 * found["rtn"]


def test_static_inputs_and_the_cache_have_the_scales_that_were_measured(
    original: Path, source: Path, tmp_path: Path
) -> None:
    from safetensors import safe_open

    from miaotui.compress.calibrate import Statistics

    values = recipe(source, scheme="w8a8-static", method="rtn", kv_cache="int8")
    out = compress(str(original), values, tmp_path / "out", cache=tmp_path / "cache").path
    (folder,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    found = Statistics(folder, 4).layer(2)
    with safe_open(out / "model.safetensors", framework="numpy") as file:
        scale = float(file.get_tensor("model.layers.2.mlp.down_proj.input_scale")[0])
        keys = float(file.get_tensor("model.layers.2.self_attn.k_scale")[0])
    inputs = found.inputs["mlp_out"]
    assert scale == pytest.approx(float(torch.maximum(-inputs.low, inputs.high).amax()) / 127.5, rel=1e-6)
    assert found.keys is not None
    assert keys == pytest.approx(float(found.keys.amax()) / 127.5, rel=1e-6)


def test_a_budget_gives_bits_to_what_needs_them(original: Path, source: Path, tmp_path: Path) -> None:
    """One layer's weights have outliers, which few bits hurt more than others'."""
    arrays = toy_folders.draw(toy_folders.CONFIG, 1)
    for name in [name for name in arrays if name.startswith("model.layers.2.mlp")]:
        arrays[name][:, ::16] *= 5
    hard = toy_folders.write(tmp_path / "hard", arrays)
    budget = {"bits": 6.5, "choices": ["w4g16-sym", "w8g16-sym"]}
    values = recipe(source, scheme="w4g16-sym", scale_type="float16", budget=budget)
    report = compress(str(hard), values, tmp_path / "out", cache=tmp_path / "c")
    checkpoint = open_checkpoint(report.path)
    bits = {
        name: (checkpoint.tensor(name).scheme.bits, checkpoint.tensor(name).codes.size)
        for name in checkpoint.names()
        if "proj" in name
    }
    average = sum((b + 1) * size for b, size in bits.values()) / sum(size for _, size in bits.values())
    assert 6 < average <= 6.5
    assert all(b == 8 for name, (b, _) in bits.items() if name.startswith("model.layers.2.mlp"))
    assert {b for b, _ in bits.values()} == {4, 8}


@pytest.mark.parametrize("scheme", ["q4_0", "q4_1", "q8_0"])
def test_gguf(scheme: str, tmp_path: Path) -> None:
    from tests.compress.writing.test_write_gguf import original, sized

    folder = original(sized("llama"), tmp_path)
    source = words(tmp_path / "words.txt")
    values = recipe(source, scheme=scheme, format="gguf", method="gptq", scale_type="auto")
    report = compress(str(folder), values, tmp_path / "out.gguf", cache=tmp_path / "cache")
    assert difference(folder, report.path) < (0.2 if scheme == "q8_0" else 1.0)  # 1.4: another model
    assert Recipe.read(tmp_path / "out.gguf.recipe.yaml") == values
    assert not list(tmp_path.glob(".out*"))


REFUSED = [
    ({"scheme": "w4g32-sym"}, "groups of 32 do not divide"),
    ({"method": "rotate+gptq", "kv_cache": "int8"}, "not known from the original's"),
    ({"overrides": [{"match": "*.nothing", "scheme": "keep"}]}, "matches no linear"),
    ({"options": {"gptq": {"dampin": 0.1}}}, "options.gptq.dampin"),
    ({"method": "gptq", "overrides": [{"match": "*.q_proj", "scheme": "keep"}]}, "read as one matrix"),
    ({"format": "gguf"}, "no name for a GGUF file"),
]


@pytest.mark.parametrize(("values", "words"), REFUSED)
def test_what_cannot_be_is_refused_before_any_work(
    values: dict[str, Any], words: str, original: Path, source: Path, tmp_path: Path
) -> None:
    told: list[Progress] = []
    with pytest.raises(MiaotuiError, match=words) as refused:
        compress(str(original), recipe(source, **values), tmp_path / "out", cache=tmp_path / "c", tell=told.append)
    assert refused.value.hint
    assert not told
    assert not (tmp_path / "out").exists()


def test_too_little_memory_is_said_before_any_work(
    original: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("miaotui.compress.preflight.available_memory", lambda: 300 << 20)
    with pytest.raises(MiaotuiError, match=r"of memory, and 315 MB is free"):
        compress(str(original), recipe(source), tmp_path / "out", cache=tmp_path / "c")


def test_the_layer_that_preflight_tries_on_known_statistics_is_kept(
    original: Path, source: Path, tmp_path: Path
) -> None:
    """A second recipe solves its first layer while it is timed, and gives the bytes that it gives from nothing."""
    told: list[Progress] = []
    chosen = recipe(source, method="gptq", scheme="w4g16-sym")
    anew = compress(str(original), chosen, tmp_path / "anew", cache=tmp_path / "anew.cache", tell=told.append)
    assert [p.done for p in told if p.stage == "solve"] == [0, 1, 2, 3, 4]
    assert anew.estimate.disk["cache"] > 0
    compress(str(original), recipe(source), tmp_path / "first", cache=tmp_path / "c")
    told.clear()
    second = compress(str(original), chosen, tmp_path / "second", cache=tmp_path / "c", tell=told.append)
    assert [p.done for p in told if p.stage == "solve"] == [1, 2, 3, 4]
    assert second.estimate.disk["cache"] == 0
    assert (second.path / "model.safetensors").read_bytes() == (anew.path / "model.safetensors").read_bytes()
    assert second.errors == anew.errors


def test_a_tied_head_has_the_embeddings_scheme(source: Path, tmp_path: Path) -> None:
    config = {**toy_folders.CONFIG, "tie_word_embeddings": True}
    arrays = {k: v for k, v in toy_folders.draw(config, 1).items() if not k.startswith("lm_head")}
    folder = toy_folders.write(tmp_path / "tied", arrays, config)
    with pytest.raises(UsageError, match="its embedding"):
        compress(str(folder), recipe(source, head="w8-sym"), tmp_path / "out", cache=tmp_path / "c")
    report = compress(str(folder), recipe(source, embedding="w8-sym"), tmp_path / "out", cache=tmp_path / "c")
    assert difference(folder, report.path) < 0.05
    rotated = compress(
        str(folder), recipe(source, method="rotate+gptq", head="w8-sym"), tmp_path / "out2", cache=tmp_path / "c"
    )
    assert difference(folder, rotated.path) < 0.05
    assert not read_spec(open_checkpoint(rotated.path))[0].tied_head


def test_the_artefact_answers_through_the_engine(original: Path, source: Path, tmp_path: Path) -> None:
    def answer(path: Path) -> str:
        with LLM(str(path), max_model_len=32) as llm:
            (output,) = llm.generate([[1, 2, 3]], use_tqdm=False)
        return output.outputs[0].text

    report = compress(str(original), recipe(source), tmp_path / "out", cache=tmp_path / "c", answer=answer)
    assert report.answer
    assert report.answer.startswith("w")


# -- ends in the middle ---------------------------------------------------------------------------------------------
KILLED = """
import os, signal, sys
from pathlib import Path
from miaotui.compress.recipe import Recipe
from miaotui.compress.run import compress

model, recipe, out, cache, *moments = sys.argv[1:]
for moment in [*map(int, moments), None]:
    child = os.fork()
    if child == 0:
        told = 0
        def tell(progress):
            global told
            told += 1
            if told == moment:
                os.kill(os.getpid(), signal.SIGKILL)
        compress(model, Recipe.read(Path(recipe)), Path(out), cache=Path(cache), tell=tell)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    print("killed" if os.WIFSIGNALED(status) else "done", os.WEXITSTATUS(status), flush=True)
"""


@pytest.mark.parametrize("values", [{"method": "gptq"}, {"method": "awq+gptq+qat", "propagate": True}])
def test_killed_at_five_moments_it_ends_with_the_same_bytes(
    values: dict[str, Any], original: Path, source: Path, tmp_path: Path
) -> None:
    if values["method"] != "gptq":
        values = {**values, "options": {"qat": {"steps": 2, "batch": 2}}}
    chosen = recipe(source, **values)
    (tmp_path / "recipe.yaml").write_text(chosen.yaml())
    draw = random.Random(values["method"])
    moments = [str(draw.randint(1, 5)) for _ in range(5)]
    run = [sys.executable, "-c", KILLED, str(original), str(tmp_path / "recipe.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.run(
        [*run, str(tmp_path / "killed"), str(tmp_path / "c1"), *moments],
        env=environment, check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert killed.stdout.split("\n")[:6] == ["killed 0"] * 5 + ["done 0"]
    subprocess.run([*run, str(tmp_path / "whole"), str(tmp_path / "c2")], env=environment, check=True)
    for path in sorted((tmp_path / "whole").iterdir()):
        if path.suffix != ".yaml":
            assert path.read_bytes() == (tmp_path / "killed" / path.name).read_bytes(), path.name


def test_an_ended_run_does_not_solve_a_layer_again(original: Path, source: Path, tmp_path: Path) -> None:
    class Ended(Exception):
        pass

    def end(progress: Progress) -> None:
        if progress.stage == "solve" and progress.done == 2:
            raise Ended

    chosen = recipe(source, propagate=True)
    with pytest.raises(Ended):
        compress(str(original), chosen, tmp_path / "out", cache=tmp_path / "c", tell=end)
    assert not (tmp_path / "out").exists()
    told: list[Progress] = []
    compress(str(original), chosen, tmp_path / "out", cache=tmp_path / "c", tell=told.append)
    assert next(p.done for p in told if p.stage == "solve") == 2


def test_another_recipe_takes_nothing_from_an_ended_one(original: Path, source: Path, tmp_path: Path) -> None:
    class Ended(Exception):
        pass

    def end(progress: Progress) -> None:
        if progress.stage == "write":
            raise Ended

    with pytest.raises(Ended):
        compress(str(original), recipe(source, method="rtn"), tmp_path / "out", cache=tmp_path / "c", tell=end)
    told: list[Progress] = []
    compress(str(original), recipe(source, method="hqq"), tmp_path / "out", cache=tmp_path / "c", tell=told.append)
    assert next(p.done for p in told if p.stage == "solve") == 0
