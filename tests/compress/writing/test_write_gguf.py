"""GGUF files: read by the `gguf` package and by us, compared with what llama.cpp's converter makes of a model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the tiny models come from PyTorch and transformers")
pytest.importorskip("transformers", reason="the tiny models come from transformers")

import gguf  # noqa: E402

from miaotui.checkpoint import open_checkpoint  # noqa: E402
from miaotui.compress.places import NORMS, Model, all_places  # noqa: E402
from miaotui.compress.recipe import parse_scheme  # noqa: E402
from miaotui.compress.types import LinearScheme, Place  # noqa: E402
from miaotui.compress.writing.gguf import RECIPE, check_gguf, write_gguf  # noqa: E402
from miaotui.compress.writing.verify import verify  # noqa: E402
from miaotui.errors import CheckpointError, UnsupportedModelError, UsageError  # noqa: E402
from miaotui.model.build import build  # noqa: E402
from miaotui.model.families import read_spec  # noqa: E402
from miaotui.quant.scheme import QuantScheme  # noqa: E402
from miaotui.quant.tensor import BlockTensor  # noqa: E402
from tests.compress.toys import Toy, decoded, solve, toy_case, write_original  # noqa: E402
from tests.golden import gguf_files, models, paged  # noqa: E402
from tests.model import tiny_tokenizers as tiny  # noqa: E402

VOCABULARY = 720
"""A few more rows than the tiny tokenizer has tokens."""

LONG = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75,
        "short_factor": [1.0 + 0.05 * i for i in range(12)],
        "long_factor": [1.5 + 0.7 * i for i in range(12)]}  # fmt: skip
CASES = {
    "llama": "q4_0", "llama-bias": "q4_1", "llama-tied": "q8_0", "llama3-rope": "q4_0", "llama-linear": "q8_0",
    "llama-yarn": "q4_0", "mistral-full": "q4_1", "mixtral": "q4_0", "qwen2": "q4_1", "qwen3": "q4_0",
    "qwen3-moe": "q8_0", "gemma2": "q4_0", "gemma3": "q8_0", "phi3": "q4_0", "phi3-partial-long": "q4_1",
    "smollm3": "q4_0", "granite": "q8_0", "olmo2": "q4_0", "starcoder2": "q4_1",
}  # fmt: skip


def sized(name: str, **settings: Any) -> models.Case:
    if "partial" in name:
        settings = {"rope_parameters": LONG, **settings}
    if name in ("gemma2", "gemma3"):
        settings = {"query_pre_attn_scalar": 32, **settings}
    return toy_case(name, vocab_size=VOCABULARY, **settings)


def original(case: models.Case, folder: Path, words: str = "smollm") -> Path:
    """A folder in bfloat16 with a byte-level tokenizer."""
    path = write_original(case, folder)
    add_tokenizer(path, tiny.byte_level(words))
    return path


def add_tokenizer(path: Path, backend: Any, **config: Any) -> None:
    backend.save(str(path / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (path / "tokenizer_config.json").write_text(json.dumps({**named, "chat_template": "{{ messages }}", **config}))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return original(sized("llama-bias"), tmp_path_factory.mktemp("original"))


def written(toy: Toy, path: Path) -> Path:
    write_gguf(toy, path, recipe_yaml="scheme: made up\n")
    return path


def twin(toy: Toy, case: models.Case) -> Any:
    """The case's transformers model with the solution's values in it."""
    model = models.make(case)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.copy_(tensor.bfloat16())
        for place in toy.places():
            value = decoded(toy, place)
            if place.role in NORMS:
                value = value - np.float32(toy.spec.norm_offset)
            parameter(model, toy, place).copy_(torch.from_numpy(value))
    return model


def parameter(model: Any, toy: Toy, place: Place) -> Any:
    if place.expert is None:
        return model.get_parameter(place.name(toy.names))
    experts = model.model.layers[place.layer].mlp.experts
    if place.role == "expert_out":
        return experts.down_proj[place.expert]
    return experts.gate_up_proj[place.expert].chunk(2)[place.part]


@pytest.mark.parametrize("name", CASES)
def test_the_same_as_the_converter_writes(name: str, tmp_path: Path) -> None:
    """Names, rows' order, norms, settings and their types, by the package's reader; and read back by our own."""
    case = sized(name)
    toy = solve(original(case, tmp_path), CASES[name], minimum="free", norms=name == "llama-bias")
    path = written(toy, tmp_path / "ours.gguf")
    verify(toy, path)
    gguf_files.write(twin(toy, case), case, tmp_path / "theirs.gguf")
    ours, theirs = gguf.GGUFReader(path), gguf.GGUFReader(tmp_path / "theirs.gguf")
    found = {tensor.name: tensor for tensor in ours.tensors}
    assert found.keys() == {tensor.name for tensor in theirs.tensors}
    for wanted in theirs.tensors:
        have = found[wanted.name]
        assert have.shape.tolist() == wanted.shape.tolist()
        values = gguf.quants.dequantize(have.data, have.tensor_type).reshape(wanted.data.shape)
        close = 1e-6 if "norm" in wanted.name or "rope" in wanted.name else 0
        np.testing.assert_allclose(values, wanted.data, rtol=close, atol=close, err_msg=wanted.name)
    for key, field in theirs.fields.items():
        if key.startswith("GGUF.") or key == "tokenizer.ggml.tokens":
            continue
        assert ours.fields[key].types == field.types, key
        have, want = ours.fields[key].contents(), field.contents()
        assert have == (pytest.approx(want, rel=1e-6) if isinstance(want, float) else want), key
    assert ours.fields[RECIPE].contents() == "scheme: made up\n"


def test_kinds_of_tensors(llama: Path, tmp_path: Path) -> None:
    """What is not coded: matrices as they were, norms and biases as float32; the head and the embedding when asked."""
    schemes = {"qkv": "q4_0", "mlp_out": "q8_0", "embedding": "q8_0"}
    roles = frozenset({"qkv", "out", "mlp_in", "mlp_out", "embedding"})
    toy = solve(llama, lambda place: schemes.get(place.role, "keep"), roles=roles)
    path = written(toy, tmp_path / "mixed.gguf")
    verify(toy, path)
    reader = gguf.GGUFReader(path)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["blk.0.attn_q.weight"] == "Q4_0"
    assert kinds["blk.1.ffn_down.weight"] == kinds["token_embd.weight"] == "Q8_0"
    assert kinds["blk.2.ffn_gate.weight"] == kinds["output.weight"] == "BF16"
    assert kinds["blk.0.attn_q.bias"] == kinds["blk.0.ffn_norm.weight"] == kinds["output_norm.weight"] == "F32"
    assert reader.fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_BF16
    assert reader.fields["general.quantization_version"].contents() == gguf.GGML_QUANT_VERSION


@pytest.mark.parametrize("name", ["llama-bias", "gemma3", "qwen3-moe"])
def test_our_engine_gives_the_logits_of_the_solution(name: str, tmp_path: Path) -> None:
    """Against transformers with the decoded weights."""
    case = sized(name)
    toy = solve(original(case, tmp_path), "q4_0", norms=False)
    ids = models.tokens(case)
    _, executor = build(open_checkpoint(written(toy, tmp_path / "out.gguf")), device="reference", compute="fp32",
                        kv_cache_dtype="fp32", max_model_len=case.length, max_num_batched_tokens=96, max_num_seqs=1,
                        max_logits_rows=96, threads=1)  # fmt: skip
    try:
        (found,) = paged.whole(executor, [ids.tolist()], [case.length])
    finally:
        executor.close()
    wanted = models.logits(twin(toy, case), ids).numpy()
    assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()


@pytest.mark.parametrize("name", ["llama3-rope", "mixtral-split", "gemma3", "phi3-partial-long"])
def test_from_gguf(name: str, tmp_path: Path) -> None:
    """Metadata and rope's divisors are copied; experts that were apart become one tensor."""
    case = sized(name)
    path = tmp_path / f"{name}.gguf"
    model = models.make(case)
    gguf_files.write(model, case, path)
    toy = solve(path, "q4_1", minimum="free")
    again = written(toy, tmp_path / "again.gguf")
    verify(toy, again)
    before, after = gguf.GGUFReader(path), gguf.GGUFReader(again)
    for key, field in before.fields.items():
        if not key.startswith("GGUF."):
            assert after.fields[key].types == field.types, key
            assert after.fields[key].contents() == field.contents(), key
    names = {tensor.name for tensor in after.tensors}
    assert {t.name for t in before.tensors if "rope" in t.name} <= names
    assert ("blk.0.ffn_up_exps.weight" in names) == (name == "mixtral-split")


def test_blocks_of_a_gguf_file_are_kept_as_they_are(demo_gguf: Path, tmp_path: Path) -> None:
    """The demo's embedding is Q8_0 and its matrices Q4_1; only one of them is coded again."""
    toy = solve(demo_gguf, lambda place: "q4_0" if place == Place("qkv", 3, 0) else "keep", norms=False)
    path = written(toy, tmp_path / "again.gguf")
    verify(toy, path)
    before, after = open_checkpoint(demo_gguf), open_checkpoint(path)
    assert set(before.names()) == set(after.names())
    for name in before.names():
        one, other = before.tensor(name), after.tensor(name)
        assert isinstance(one, BlockTensor) == isinstance(other, BlockTensor)
        changed = isinstance(other, BlockTensor) and other.kind == "Q4_0"
        assert changed == (name == "blk.3.attn_q.weight")
        assert changed or np.array_equal(one.data, other.data)
    kept = {k: v for k, v in before.config.items() if k not in ("general.file_type", "general.quantization_version")}
    for key, value in kept.items():
        np.testing.assert_equal(after.config[key], value)


def test_a_tied_head_may_be_untied(tmp_path: Path) -> None:
    folder = original(sized("llama-tied"), tmp_path)
    toy = solve(folder, "q4_0")
    head = solve(folder, "q8_0", roles=frozenset({"embedding"}), norms=False)
    toy.tensors[Place("head")] = head.tensors[Place("embedding")]
    toy.schemes[Place("head")] = head.schemes[Place("embedding")]
    path = written(toy, tmp_path / "out.gguf")
    verify(toy, path)
    assert open_checkpoint(path).tensor("output.weight").shape == (VOCABULARY, 192)


# -- what GGUF cannot hold ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("scheme", ["w4g64-sym", "w3g32-sym", "w8-sym", "w8a8", "w8g32-asym", "fp8"])
def test_schemes_without_blocks_are_refused(llama: Path, tmp_path: Path, scheme: str) -> None:
    with pytest.raises(UsageError, match=r"no blocks for .*q4_1 \(w4g32-asym\).*compressed-tensors"):
        written(solve(llama, scheme), tmp_path / "out.gguf")
    assert not list(tmp_path.iterdir())


def test_scales_of_another_type_are_refused(llama: Path) -> None:
    toy = solve(llama, "q4_0")
    bfloat = LinearScheme(QuantScheme(4, 32, True, "bfloat16"))
    with pytest.raises(UsageError, match=r"w4g32-sym with bfloat16 scales.*float16 scales"):
        check_gguf(toy.source, toy.spec, toy.names, dict.fromkeys(toy.schemes, bfloat))


def test_a_coded_cache_is_refused(llama: Path) -> None:
    toy = solve(llama, "q4_0")
    with pytest.raises(UsageError, match=r"int8 KV cache.*kv_cache"):
        check_gguf(toy.source, toy.spec, toy.names, toy.schemes, "int8")


def test_rows_are_whole_blocks(tmp_path: Path) -> None:
    folder = original(sized("llama", intermediate_size=100), tmp_path)
    with pytest.raises(UsageError, match=r"down_proj have 100 weights, not a multiple of 32.*Keep it"):
        written(solve(folder, "q4_0"), tmp_path / "out.gguf")
    toy = solve(folder, lambda place: "keep" if place.role == "mlp_out" else "q4_0")
    verify(toy, written(toy, tmp_path / "out.gguf"))


def test_experts_of_a_layer_share_a_scheme(tmp_path: Path) -> None:
    folder = original(sized("mixtral"), tmp_path)
    toy = solve(folder, lambda place: "q8_0" if place.expert == 2 else "q4_0")
    with pytest.raises(UsageError, match=r"experts in blk.0.ffn_gate_exps.weight"):
        written(toy, tmp_path / "out.gguf")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("mistral", "the window"),
        ("qwen2-window", "the window"),
        ("llama-dynamic", "'dynamic'"),
        ("gemma2-scale", "scale of the scores"),
        ("qwen3-moe-mixed", "experts"),
    ],
)
def test_models_without_words_are_refused(name: str, why: str, tmp_path: Path) -> None:
    toy = solve(original(sized(name), tmp_path), "q4_0")
    with pytest.raises(UnsupportedModelError, match=f"GGUF cannot say.*{why}.*compressed-tensors"):
        written(toy, tmp_path / "out.gguf")


# -- read back ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "tensor", ["blk.1.attn_k.weight", "blk.0.ffn_norm.weight", "blk.2.ffn_up.bias", "output.weight"]
)
def test_a_flipped_bit_is_found(llama: Path, tmp_path: Path, tensor: str) -> None:
    toy = solve(llama, "q4_0")
    path = written(toy, tmp_path / "out.gguf")
    start = next(t for t in gguf.GGUFReader(path).tensors if t.name == tensor).data_offset
    data = bytearray(path.read_bytes())
    data[start + 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=tensor):
        verify(toy, path)


@pytest.mark.parametrize(
    ("key", "why"), [("llama.rope.freq_base", "the rotary embedding"), ("tokenizer.ggml.merges", "other tokens")]
)
def test_changed_settings_are_found(llama: Path, tmp_path: Path, key: str, why: str) -> None:
    toy = solve(llama, "q4_0")
    path = written(toy, tmp_path / "out.gguf")
    data = path.read_bytes()
    if key.endswith("merges"):
        first, *others = (merge.encode() for merge in open_checkpoint(path).config[key])
        data = data.replace(first, next(other for other in others if len(other) == len(first)), 1)
    else:
        at = data.index(key.encode()) + len(key) + 4
        data = data[:at] + np.float32(123.0).tobytes() + data[at + 4 :]
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=why):
        verify(toy, path)


def test_changed_metadata_of_a_gguf_source_is_found(tmp_path: Path) -> None:
    write_original(toy_case("llama"), tmp_path, "gguf")
    toy = solve(tmp_path / "llama.gguf", "q4_0")
    path = written(toy, tmp_path / "out.gguf")
    verify(toy, path)
    toy.source.config["general.name"] = "another"  # type: ignore[index]
    with pytest.raises(CheckpointError, match=r"general.name"):
        verify(toy, path)


def test_every_place_reads_back(llama: Path, tmp_path: Path) -> None:
    """Not by `verify`: the effective values of every place, and as many of them."""
    toy = solve(llama, "q4_1", minimum="free")
    checkpoint = open_checkpoint(written(toy, tmp_path / "out.gguf"))
    read = Model(checkpoint, *read_spec(checkpoint))
    before = Model(toy.source, toy.spec, toy.names)
    assert set(read.places()) == set(all_places(toy))
    for place in read.places():
        wanted = decoded(toy, place) if place in toy.tensors else before.values(place).dense32()
        np.testing.assert_array_equal(read.values(place).dense32(), wanted, err_msg=str(place))


def test_scheme_names_of_gguf_have_blocks() -> None:
    assert parse_scheme("q4_0") == replace(parse_scheme("w4g32-sym", "float16"))
