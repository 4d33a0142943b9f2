"""Greedy answers of the demo model: transformers in float32 as the oracle, and our engine held against it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from transformers import PreTrainedModel

from miaotui import LLM, SamplingParams

TIE = 1e-4
"""Where the oracle's two greatest logits are closer than this, either token is right."""

BLOCK_BYTES = 30 * 3 * 64 * 2 * 4 * 16
"""One cache block of the demo model in float32: layers, kv heads, head_dim, k and v, bytes, positions."""

SETTINGS: dict[str, dict[str, Any]] = {
    "batch 1": {"max_num_seqs": 1, "enable_prefix_caching": False},
    "batch 40": {"max_num_seqs": 40, "enable_prefix_caching": False},
    "token budget 37": {"max_num_seqs": 40, "max_num_batched_tokens": 37, "enable_prefix_caching": False},
    "forced preemption": {"max_num_seqs": 40, "enable_prefix_caching": False, "max_model_len": 1024},
    "prefix hits": {"max_num_seqs": 40},
}
"""Ways of running that must not change an answer. "forced preemption" is given a cache too small for its batch, and
"prefix hits" asks everything twice."""


@dataclass(frozen=True)
class Expected:
    """The oracle's answer: tokens, and at each the gap between its two greatest logits."""

    prompt: list[int]
    tokens: list[int]
    gaps: list[float]


@dataclass(frozen=True)
class Outcome:
    """What a way of running gave: lines for divergences that count and for those at the oracle's own ties."""

    divergences: list[str]
    ties: list[str]
    preemptions: int
    prefix_hits: int


def oracle(path: Path) -> PreTrainedModel:
    """transformers' Llama with the weights that the `gguf` package reads from the same file, in float32."""
    reader = gguf.GGUFReader(path)

    def value(key: str) -> Any:
        return reader.fields[f"llama.{key}"].contents()

    config = transformers.LlamaConfig(
        vocab_size=value("vocab_size"),
        hidden_size=value("embedding_length"),
        intermediate_size=value("feed_forward_length"),
        num_hidden_layers=value("block_count"),
        num_attention_heads=value("attention.head_count"),
        num_key_value_heads=value("attention.head_count_kv"),
        max_position_embeddings=value("context_length"),
        rms_norm_eps=value("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": value("rope.freq_base")},
        tie_word_embeddings=True,
    )
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    state = {}
    for name in model.state_dict():
        if name == "lm_head.weight":
            continue
        tensor = stored[names.get_name(name.removesuffix(".weight")) + ".weight"]
        weight = torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32))
        if ".q_proj." in name or ".k_proj." in name:
            heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
            weight = weight.view(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        state[name] = weight
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval()


def expect(model: PreTrainedModel, prompt: Sequence[int], count: int, ends: Iterable[int]) -> Expected:
    """Greedy continuation of one prompt, alone, token by token, until `count` tokens or one of `ends`."""
    stop, tokens, gaps = set(ends), list[int](), list[float]()
    ids, cache = torch.tensor([list(prompt)]), None
    with torch.inference_mode():
        while len(tokens) < count and not (tokens and tokens[-1] in stop):
            out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, top = out.past_key_values, out.logits[0, -1].topk(2)
            tokens.append(int(top.indices[0]))
            gaps.append(float(top.values[0] - top.values[1]))
            ids = top.indices[:1][None]
    return Expected(list(prompt), tokens, gaps)


def run(setting: str, model: str, expected: Sequence[Expected], count: int) -> Outcome:
    """Answer all prompts in this setting, exactly computed, and compare."""
    options = dict(SETTINGS[setting])
    if setting == "forced preemption":
        longest = max(len(e.prompt) for e in expected) + count
        options["kv_cache_memory_bytes"] = BLOCK_BYTES * (-(-longest // 16) + 8)
    rounds = 2 if setting == "prefix hits" else 1
    params = SamplingParams(temperature=0.0, max_tokens=count)
    with LLM(model, compute="fp32", kv_cache_dtype="fp32", **options) as llm:
        for _ in range(rounds):
            outputs = llm.generate([e.prompt for e in expected], params)
        stats = llm.engine.stats
        llm.engine.check_integrity()
    real, ties = divergences(expected, [list(o.outputs[0].token_ids) for o in outputs])
    return Outcome(real, ties, stats.preemptions, stats.prefix_hits)


def divergences(expected: Sequence[Expected], got: Sequence[Sequence[int]]) -> tuple[list[str], list[str]]:
    """(those that count, those at a tie of the oracle's own), each told in a line."""
    real, ties = [], []
    for index, (want, tokens) in enumerate(zip(expected, got, strict=True)):
        if list(tokens) == want.tokens:
            continue
        at = next((i for i, pair in enumerate(zip(want.tokens, tokens, strict=False)) if pair[0] != pair[1]), None)
        if at is None:
            real.append(f"prompt {index}: {len(tokens)} tokens for {len(want.tokens)}")
            continue
        line = f"prompt {index}, token {at}: {tokens[at]} for {want.tokens[at]}, gap {want.gaps[at]:.2e}"
        (ties if want.gaps[at] <= TIE else real).append(line)
    return real, ties
