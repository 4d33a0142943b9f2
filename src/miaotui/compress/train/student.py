"""The tensors that are trained: all of a model, or low-rank additions to it; in codes, where they are to be coded."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import torch

from miaotui.checkpoint import open_checkpoint, resolve
from miaotui.checkpoint.base import Checkpoint
from miaotui.checkpoint.write import atomic_folder
from miaotui.compress.methods.grid import Grid, check_width, fit
from miaotui.compress.places import LINEARS, NORMS, Model
from miaotui.compress.recipe import parse_scheme
from miaotui.compress.train import coded, network
from miaotui.compress.train.folder import dense_config, write_model
from miaotui.compress.types import Place
from miaotui.errors import UsageError
from miaotui.model.dummy import DummyCheckpoint
from miaotui.model.families import describe, read_spec
from miaotui.model.names import Names
from miaotui.model.spec import ModelSpec
from miaotui.quant.dummy import Storage
from miaotui.quant.tensor import DenseType

INITIAL_SPREAD = 0.02
"""Standard deviation of a new model's weights (GPT-2, Radford et al. 2019)."""


@dataclass(frozen=True)
class Lora:
    """Low-rank additions of `rank` to the linears whose names match a target, times alpha / rank (Hu et al. 2021)."""

    rank: int
    alpha: float | None = None
    targets: tuple[str, ...] = ("*",)

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UsageError(f"The rank is {self.rank}.", "Give a whole number such as 8 or 16.")
        if self.alpha is not None and not (math.isfinite(self.alpha) and self.alpha > 0):
            raise UsageError(f"LoRA's alpha is {self.alpha}.", "Give a positive number, such as twice the rank.")

    @property
    def scale(self) -> float:
        return (2 * self.rank if self.alpha is None else self.alpha) / self.rank


@dataclass(eq=False)
class Student:
    """A model under training. `values` are float32 by place and effective; `names`, `config` are of the folder to be.

    source: where tokenizer and other text files come from. grids: on which linears are coded in every forward pass; the
    numbers underneath stay float32 (straight-through, Bengio et al. 2013, arXiv 1308.3432).
    """

    spec: ModelSpec
    names: Names
    config: dict[str, Any]
    norm_offset: float
    source: Checkpoint
    values: dict[Place, torch.Tensor]
    grids: dict[Place, Grid] = field(default_factory=dict)
    lora: Lora | None = None
    factors: dict[Place, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    _coded: dict[Place, torch.Tensor] = field(default_factory=dict)

    # -- making ------------------------------------------------------------------------------------------
    @classmethod
    def of(cls, model: str, device: str = "cpu") -> Student:
        """From MODEL: safetensors or GGUF, of any family. A compressed-tensors folder stays in its codes.

        Other coded weights are plain numbers from then on. Raises ModelNotFoundError, CheckpointError,
        UnsupportedModelError; UsageError for codes that training cannot imitate.
        """
        checkpoint = open_checkpoint(resolve(model))
        described = describe(checkpoint)
        spec, names = read_spec(checkpoint)
        family = described.family
        opened = Model(checkpoint, spec, names)
        grids = coded.grids_of(opened, device)
        return cls(
            spec,
            family.hf_names if checkpoint.format == "gguf" else names,
            dense_config(checkpoint, spec),
            family.norm_offset,
            checkpoint,
            network.read(opened, device=device),
            grids,
        )

    @classmethod
    def new(cls, config: Mapping[str, Any], source: Checkpoint, seed: int = 0, device: str = "cpu") -> Student:
        """Of a config.json, with random weights; `source` has the tokenizer.

        Normal with INITIAL_SPREAD, less for what is added to the residual stream (÷ √(2·layers), GPT-2); norms 1.
        """
        made = DummyCheckpoint(Path("config.json"), config, Storage.parse("bf16"))
        spec, names = made.spec, made.described.names
        generator = torch.Generator().manual_seed(seed)
        values = {}
        for place in Model(made, spec, names).places():
            shape = made.shapes[place.name(names)]
            values[place] = _initial(place, shape, len(spec.layers), generator).to(device)
        return cls(spec, names, dict(config), spec.norm_offset, source, values)

    def code(self, scheme: str) -> None:
        """Train the linears of all layers as codes of this scheme, on the grids that suit them best as they are now.

        Raises UsageError where it cannot be.
        """
        if self.grids:
            raise UsageError("The student is in codes already.", "Leave out --scheme, or give the model it came from.")
        parsed = parse_scheme(scheme)
        if parsed.weights is None or parsed.inputs != "none":
            raise UsageError(
                f"Training cannot imitate {scheme!r:.60}, only integer weights.", "Choose one such as w4g64-sym."
            )
        if self.lora is not None:
            raise UsageError("Low-rank additions cannot be merged into codes.", "Leave out either --lora or --scheme.")
        for place, value in self.values.items():
            if place.role in LINEARS and not place.bias:
                check_width(value.shape[1], parsed.weights, place.name(self.names))
                self.grids[place] = fit(value.detach(), parsed.weights, "mse")

    def adapt(self, lora: Lora, seed: int = 0) -> None:
        """Train low-rank additions instead of the weights: down random, up 0, so that nothing changes at first.

        Raises UsageError where no linear is a target.
        """
        if self.grids:
            raise UsageError("Low-rank additions cannot be merged into codes.", "Leave out either --lora or --scheme.")
        generator = torch.Generator().manual_seed(seed)
        self.lora = lora
        for place, value in self.values.items():
            stem = place.name(self.names).removesuffix(".weight")
            if place.role not in LINEARS or place.bias or not any(fnmatchcase(stem, t) for t in lora.targets):
                continue
            out, width = value.shape
            rank = min(lora.rank, out, width)
            down = torch.empty(rank, width).uniform_(-1, 1, generator=generator) / math.sqrt(width)
            self.factors[place] = down.to(value.device), torch.zeros(out, rank, device=value.device)
        if not self.factors:
            raise UsageError(
                f"No linear is called {' or '.join(lora.targets)}.", "Give patterns such as *.q_proj or *mlp*."
            )

    # -- training ----------------------------------------------------------------------------------------
    def parameters(self) -> dict[str, torch.Tensor]:
        """What is trained, by name; every one a leaf that wants a gradient."""
        found: dict[str, torch.Tensor] = {}
        if self.lora is None:
            found = {place.name(self.names): value for place, value in self.values.items()}
        for place, (down, up) in self.factors.items():
            stem = place.name(self.names).removesuffix(".weight")
            found |= {f"{stem}.lora_down": down, f"{stem}.lora_up": up}
        return {name: value.requires_grad_() for name, value in found.items()}

    def refresh(self) -> None:
        """Code the weights as they are now; to be called after every change of them."""
        for place, grid in self.grids.items():
            value = self.values[place].detach()
            self._coded[place] = grid.nearest(value) - value

    def effective(self) -> dict[Place, torch.Tensor]:
        """The weights that the network multiplies by; gradients reach the parameters."""
        if self.grids and not self._coded:
            self.refresh()
        return self.values | {place: self.values[place] + change for place, change in self._coded.items()}

    def run(
        self,
        tokens: torch.Tensor,
        *,
        states: frozenset[int] = frozenset(),
        product: torch.dtype = torch.float32,
        recompute: bool = False,
    ) -> tuple[network.Reading, torch.Tensor]:
        """What it makes of windows `[windows, length]`, and the matrix that makes logits of it."""
        values = self.effective()
        scale = 1.0 if self.lora is None else self.lora.scale
        adapters = {place: (down, up * scale) for place, (down, up) in self.factors.items()}
        reading = network.run(
            self.spec, values, tokens, adapters=adapters, states=states, product=product, recompute=recompute
        )
        return reading, values[network.head_of(self.spec)]

    def forward(self, tokens: torch.Tensor, product: torch.dtype = torch.float32) -> torch.Tensor:
        """Logits `[windows, length, vocabulary]`."""
        reading, head = self.run(tokens, product=product)
        return network.logits(self.spec, reading.last, head, product=product).view(*tokens.shape, -1)

    def size(self) -> int:
        """Numbers in the whole model; a tied head counts once."""
        return sum(value.numel() for value in self.values.values())

    # -- writing -----------------------------------------------------------------------------------------
    @torch.no_grad()
    def merged(self, place: Place) -> torch.Tensor:
        """A place's weight with its low-rank addition, uncoded."""
        value = self.values[place].detach()
        if place in self.factors and self.lora is not None:
            down, up = self.factors[place]
            return value + (up @ down) * self.lora.scale
        return value

    def write(self, out: Path, kind: DenseType = "float32", *, replace: bool = False) -> None:
        """A Hugging Face folder that appears whole or not at all: compressed-tensors where the student is in codes.

        Raises UsageError where `out` is there already.
        """
        with atomic_folder(out, replace=replace) as building:
            self.write_into(building, kind)

    def write_into(self, folder: Path, kind: DenseType) -> None:
        """Weights, configuration and tokenizer, into an empty folder; what is not coded, as `kind`."""
        if not self.grids:
            write_model(folder, self.shapes(), self._stored, kind, self.config, self.source, self.spec)
            return
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".plain.") as plain:
            write_model(Path(plain), self.shapes(), self._stored, kind, self.config, self.source, self.spec)
            coded.write(Path(plain), self.values, self.grids, folder)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {place.name(self.names): tuple(value.shape) for place, value in self.values.items()}

    def _stored(self, name: str) -> np.ndarray[Any, np.dtype[np.float32]]:
        place = next(place for place in self.values if place.name(self.names) == name)
        value = self.merged(place).float().cpu()
        if place.role in NORMS and not place.bias and self.norm_offset:
            value = value - self.norm_offset
        return np.asarray(value.numpy(), dtype=np.float32)


# -- new models --------------------------------------------------------------------------------------------------
SHAPE_KEYS = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "ffn": "intermediate_size",
    "heads": "num_attention_heads",
    "kv": "num_key_value_heads",
    "head": "head_dim",
    "vocab": "vocab_size",
    "positions": "max_position_embeddings",
}


def shape_config(config: Mapping[str, Any], shape: Mapping[str, int]) -> dict[str, Any]:
    """A config.json with these of SHAPE_KEYS changed. Raises UsageError for another key or an impossible shape.

    Where `hidden` or `heads` changes and `head` is not given, a head is as wide as hidden / heads.
    """
    unknown = [key for key in shape if key not in SHAPE_KEYS]
    if unknown:
        raise UsageError(f"A shape has no {unknown[0]!r:.40}.", f"It has {', '.join(SHAPE_KEYS)}.")
    made = {key: value for key, value in config.items() if key != "quantization_config"}
    made |= {SHAPE_KEYS[key]: value for key, value in shape.items()}
    heads, hidden = made["num_attention_heads"], made["hidden_size"]
    if "heads" in shape and "kv" not in shape:
        made["num_key_value_heads"] = heads
    if "head" not in shape and ({"hidden", "heads"} & set(shape) or made.get("head_dim") is None):
        if hidden % heads:
            raise UsageError(f"{heads} heads do not divide a hidden size of {hidden}.", "Give head=… or other heads.")
        made["head_dim"] = hidden // heads
    if isinstance(made.get("layer_types"), list):
        kinds = made["layer_types"]
        made["layer_types"] = [kinds[i % len(kinds)] for i in range(made["num_hidden_layers"])]
    return made


def _initial(place: Place, shape: tuple[int, ...], layers: int, generator: torch.Generator) -> torch.Tensor:
    if place.bias:
        return torch.zeros(shape)
    if place.role in NORMS:
        return torch.ones(shape)
    spread = (
        INITIAL_SPREAD / math.sqrt(2 * layers) if place.role in ("out", "mlp_out", "expert_out") else INITIAL_SPREAD
    )
    return torch.randn(shape, generator=generator) * spread
