"""What each role's tensors are called in a file: data for `build`, for compression and for writers.

A role is one linear or norm of the decoder. Its stems are stacked along `out` in this order; `.weight` and `.bias`
follow. `{}` stands for the expert's number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

Roles = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Names:
    """One family's names in one format. `layers` is the prefix of a layer, with `{}` for its number."""

    embedding: str
    norm: str
    head: str
    layers: str
    roles: Roles
    ignorable: tuple[str, ...] = field(default=())
    """Parts of names of tensors that say nothing the configuration doesn't, such as saved rotary frequencies."""
    interleaved: bool = False
    """Rows of each Q and K head are its two halves interleaved, as llama.cpp's converter leaves them."""

    def stems(self, role: str, layer: int, expert: int | None = None) -> tuple[str, ...]:
        """The names, without `.weight`, of one role in one layer; empty when the family has no such role."""
        prefix = self.layers.format(layer)
        return tuple(prefix + (stem if expert is None else stem.format(expert)) for stem in self.roles.get(role, ()))

    def with_roles(self, **roles: tuple[str, ...]) -> Names:
        """A copy with these roles changed; an empty tuple takes a role away."""
        merged = {role: stems for role, stems in {**self.roles, **roles}.items() if stems}
        return replace(self, roles=merged)


HF = Names(
    embedding="model.embed_tokens",
    norm="model.norm",
    head="lm_head",
    layers="model.layers.{}.",
    roles={
        "attention_norm": ("input_layernorm",),
        "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "q_norm": ("self_attn.q_norm",),
        "k_norm": ("self_attn.k_norm",),
        "out": ("self_attn.o_proj",),
        "mlp_norm": ("post_attention_layernorm",),
        "mlp_in": ("mlp.gate_proj", "mlp.up_proj"),
        "mlp_out": ("mlp.down_proj",),
        "router": ("mlp.gate",),
        "expert_in": ("mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj"),
        "expert_out": ("mlp.experts.{}.down_proj",),
    },
    ignorable=("rotary_emb.inv_freq", "self_attn.masked_bias", "self_attn.bias_mask", ".k_scale", ".v_scale"),
)

HF_MIXTRAL = HF.with_roles(
    router=("block_sparse_moe.gate",),
    expert_in=("block_sparse_moe.experts.{}.w1", "block_sparse_moe.experts.{}.w3"),
    expert_out=("block_sparse_moe.experts.{}.w2",),
)
HF_GEMMA = HF.with_roles(
    attention_post_norm=("post_attention_layernorm",),
    mlp_norm=("pre_feedforward_layernorm",),
    mlp_post_norm=("post_feedforward_layernorm",),
)
HF_OLMO2 = HF.with_roles(
    attention_norm=(),
    mlp_norm=(),
    attention_post_norm=("post_attention_layernorm",),
    mlp_post_norm=("post_feedforward_layernorm",),
)
HF_PHI3 = HF.with_roles(qkv=("self_attn.qkv_proj",), mlp_in=("mlp.gate_up_proj",))
HF_STARCODER2 = HF.with_roles(mlp_in=("mlp.c_fc",), mlp_out=("mlp.c_proj",))

GGUF = Names(
    embedding="token_embd",
    norm="output_norm",
    head="output",
    layers="blk.{}.",
    roles={
        "attention_norm": ("attn_norm",),
        "attention_post_norm": ("post_attention_norm",),
        "qkv": ("attn_q", "attn_k", "attn_v"),
        "q_norm": ("attn_q_norm",),
        "k_norm": ("attn_k_norm",),
        "out": ("attn_output",),
        "mlp_norm": ("ffn_norm",),
        "mlp_post_norm": ("post_ffw_norm",),
        "mlp_in": ("ffn_gate", "ffn_up"),
        "mlp_out": ("ffn_down",),
        "router": ("ffn_gate_inp",),
        "experts_in": ("ffn_gate_exps", "ffn_up_exps"),
        "experts_out": ("ffn_down_exps",),
        "expert_in": ("ffn_gate.{}", "ffn_up.{}"),
        "expert_out": ("ffn_down.{}",),
    },
    ignorable=("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight", "attn_rot_embd.weight"),
)
GGUF_INTERLEAVED = replace(GGUF, interleaved=True)
GGUF_PHI3 = GGUF.with_roles(qkv=("attn_qkv",), mlp_in=("ffn_up",))
GGUF_STARCODER2 = GGUF.with_roles(mlp_in=("ffn_up",))
