"""compressed-tensors folders: read by compressed-tensors' own package, by transformers, and by us."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the tiny models come from PyTorch and transformers")
transformers = pytest.importorskip("transformers", reason="the tiny models come from transformers")

from safetensors.torch import load_file  # noqa: E402

from miaotui.checkpoint import open_checkpoint  # noqa: E402
from miaotui.compress.methods.fp8 import fp8_activations, int8_activations  # noqa: E402
from miaotui.compress.places import LINEARS, Model, all_places  # noqa: E402
from miaotui.compress.types import Place  # noqa: E402
from miaotui.compress.writing.folder import write_folder  # noqa: E402
from miaotui.compress.writing.verify import verify  # noqa: E402
from miaotui.errors import UnsupportedModelError, UsageError  # noqa: E402
from miaotui.model.families import read_spec  # noqa: E402
from miaotui.model.tokenizer import Tokenizer  # noqa: E402
from tests.compress.toys import Toy, decoded, solve, toy_case, write_original  # noqa: E402

SCHEMES = ("w4g64-sym", "w4g32-asym", "w3g64-sym", "w2g32-asym", "w8-sym", "w8a8", "w8a8-static", "w4a8g32-sym", "fp8",
           "fp8-static")  # fmt: skip


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_original(toy_case("llama-bias"), tmp_path_factory.mktemp("original"))


def written(toy: Toy, folder: Path) -> Path:
    folder.mkdir()
    write_folder(toy, folder)
    return folder


def mixed(place: Place) -> str:
    """A scheme for each role, layer 1 left alone."""
    if place.layer == 1:
        return "keep"
    return {"qkv": "w8a8", "out": "w4g64-sym", "mlp_in": "fp8", "mlp_out": "w3g32-asym"}[place.role]


@pytest.mark.parametrize("scheme", [*SCHEMES, "keep", mixed], ids=lambda s: s if isinstance(s, str) else "mixed")
def test_what_was_written_is_what_was_meant(llama: Path, tmp_path: Path, scheme: Any) -> None:
    toy = solve(llama, scheme)
    toy.kv_scales, toy.kv_scheme = {0: (0.5, 0.25), 2: (0.125, 1.5)}, "fp8"
    folder = written(toy, tmp_path / "out")
    verify(toy, folder)
    checkpoint = open_checkpoint(folder)
    read = Model(checkpoint, *read_spec(checkpoint))
    for place in toy.places():
        np.testing.assert_array_equal(read.values(place).dense32(), decoded(toy, place), err_msg=str(place))
    original = Model(toy.source, toy.spec, toy.names)
    for place in set(all_places(toy)) - set(toy.places()):
        np.testing.assert_array_equal(read.values(place).dense32(), original.values(place).dense32())


@pytest.mark.parametrize("scheme", [*SCHEMES, mixed], ids=lambda s: s if isinstance(s, str) else "mixed")
def test_the_package_reads_every_module(llama: Path, tmp_path: Path, scheme: Any) -> None:
    """Which scheme each module has, and what it decompresses to, by compressed-tensors' own reading of the folder."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    toy = solve(llama, scheme, norms=False)
    folder = written(toy, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    quantization = QuantizationConfig.model_validate(config["quantization_config"])
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(llama))
    apply_quantization_config(model, quantization)
    stored = load_file(folder / "model.safetensors")
    for place, chosen in toy.schemes.items():
        stem = place.name(toy.names).removesuffix(".weight")
        scheme_of_module = getattr(model.get_submodule(stem), "quantization_scheme", None)
        assert (scheme_of_module is None) == chosen.kept, stem
        if scheme_of_module is None:
            continue
        parts = {name.removeprefix(stem + "."): t for name, t in stored.items() if name.startswith(stem + ".")}
        parts.pop("bias", None)
        if scheme_of_module.input_activations is not None and not scheme_of_module.input_activations.dynamic:
            assert parts.pop("input_scale").item() == pytest.approx(toy.input_scales[place])
        compressor = BaseCompressor.get_value_from_registry(scheme_of_module.format)
        assert set(parts) <= set(compressor.compression_param_names(scheme_of_module))
        read = compressor.decompress(parts, scheme_of_module)["weight"].float().numpy()
        wanted = decoded(toy, place)
        np.testing.assert_allclose(read, wanted, rtol=0, atol=0.01 * np.abs(wanted).max())  # scales in bf16
    for name in ("lm_head", "model.embed_tokens"):
        assert getattr(model.get_submodule(name), "quantization_scheme", None) is None


@pytest.mark.parametrize("scheme", ["w4g64-sym", "w8-sym", "w8a8", "w8a8-static", "fp8"])
def test_transformers_gives_the_same_logits(llama: Path, tmp_path: Path, scheme: str) -> None:
    """Against the decoded weights in the original, inputs of its linears coded where the scheme says so.

    Not asymmetric ones: compressed-tensors 0.20 makes room for zero points that are not packed, and refuses its own.
    """
    toy = solve(llama, scheme)
    toy.input_scales = dict.fromkeys(toy.input_scales, 0.04)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(written(toy, tmp_path / "out"), dtype=torch.float32)
    dense = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    code = {"w8a8": int8_activations, "fp8": fp8_activations,
            "w8a8-static": lambda x: int8_activations(x, torch.tensor(0.04))}.get(scheme)  # fmt: skip
    with torch.no_grad():
        for place in toy.places():
            dense.get_parameter(place.name(toy.names)).copy_(torch.from_numpy(decoded(toy, place)))
            if place in toy.schemes and code is not None:
                module = dense.get_submodule(place.name(toy.names).removesuffix(".weight"))
                module.register_forward_pre_hook(lambda _, inputs: (code(inputs[0]),))
        ids = torch.randint(0, 211, (1, 24), generator=torch.Generator().manual_seed(0))
        got, wanted = theirs(ids).logits, dense(ids).logits
    tolerance = 1e-4 if code is None else 0.02  # a rounding that falls the other way is felt by all that follows
    assert (got - wanted).abs().max() <= tolerance * wanted.abs().max()


@pytest.mark.parametrize("name", ["qwen2", "gemma2", "phi3", "mixtral", "qwen3-moe", "olmo2", "starcoder2", "granite"])
def test_every_kind_of_family(name: str, tmp_path: Path) -> None:
    """Norm offsets, stacked projections, experts, biases."""
    toy = solve(write_original(toy_case(name), tmp_path), "w4g32-sym")
    folder = written(toy, tmp_path / "out")
    verify(toy, folder)


@pytest.mark.parametrize(
    "name", ["llama", "llama-yarn", "mixtral-split", "qwen3", "gemma3", "phi3", "smollm3", "granite"]
)
def test_from_gguf(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names, the order of rows, norms and the configuration become those of safetensors."""
    case = toy_case(name)
    toy = solve(write_original(case, tmp_path, "gguf"), "w4g32-sym")
    add_tokenizer(toy)
    folder = written(toy, tmp_path / "out")
    verify(toy, folder)
    config = transformers.AutoConfig.from_pretrained(folder)
    assert type(config).__name__ == ("Gemma3TextConfig" if case.prefix == "Gemma3" else f"{case.prefix}Config")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = "hello 世界"
    ids = Tokenizer.from_checkpoint(toy.source).encode(text)
    assert tokenizer(text)["input_ids"] == ids
    assert ids[0] == 1
    assert tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False) == text


def add_tokenizer(toy: Toy) -> None:
    """A SentencePiece vocabulary of 211 tokens, in the metadata of a GGUF source."""
    tokens = ["<unk>", "<s>", "</s>", "▁", "h", "▁hello", "▁world"]
    tokens += [f"<0x{byte:02X}>" for byte in range(204)]
    metadata: Any = toy.source.config
    metadata.update({
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.zeros(211, np.float32),
        "tokenizer.ggml.token_type": np.array([2, 3, 3, 1, 1, 4, 4] + [6] * 204, np.int32),
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": True, "tokenizer.chat_template": "{{ messages[0].content }}",
    })  # fmt: skip


def test_a_divided_rope_has_no_words_in_a_configuration(tmp_path: Path) -> None:
    toy = solve(write_original(toy_case("llama3-rope"), tmp_path, "gguf"), "w4g32-sym")
    add_tokenizer(toy)
    with pytest.raises(UnsupportedModelError, match="divisors"):
        written(toy, tmp_path / "out")


def test_a_tied_head_may_be_untied(tmp_path: Path) -> None:
    toy = solve(write_original(toy_case("llama-tied", num_attention_heads=6), tmp_path), "w4g64-sym")
    head = solve(tmp_path / "llama-tied", "w8-sym", roles=frozenset({"embedding"}), norms=False)
    toy.tensors[Place("head")] = head.tensors[Place("embedding")]
    toy.schemes[Place("head")] = head.schemes[Place("embedding")]
    folder = written(toy, tmp_path / "out")
    verify(toy, folder)
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False


def test_stacked_parts_share_a_scheme(llama: Path, tmp_path: Path) -> None:
    toy = solve(llama, lambda place: "w8-sym" if place.part == 2 else "w4g64-sym")
    with pytest.raises(UsageError, match=r"q_proj and .*v_proj"):
        written(toy, tmp_path / "out")


def test_assets_go_along(tmp_path: Path) -> None:
    original = write_original(toy_case("llama"), tmp_path)
    (original / "tokenizer.json").write_text("{}")
    (original / "chat_template.jinja").write_text("x")
    (original / "additional_chat_templates").mkdir()
    (original / "additional_chat_templates" / "tools.jinja").write_text("y")
    (original / "notes.txt").write_text("z")
    folder = written(solve(original, "w4g64-sym", roles=LINEARS), tmp_path / "out")
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert names == {
        "config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "generation_config.json",
        "additional_chat_templates/tools.jinja",
    }  # fmt: skip
