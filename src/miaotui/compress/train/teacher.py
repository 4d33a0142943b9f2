"""The model that a student learns from: read once, never changed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from miaotui.checkpoint import open_checkpoint, resolve
from miaotui.checkpoint.base import Checkpoint
from miaotui.compress.places import Model
from miaotui.compress.train import network
from miaotui.compress.train.student import Student
from miaotui.compress.types import Place
from miaotui.errors import UsageError
from miaotui.model.families import read_spec
from miaotui.model.spec import ModelSpec
from miaotui.model.tokenizer import Tokenizer


@dataclass(frozen=True, eq=False)
class Teacher:
    """`values` by place, matrices in the type that they are multiplied in."""

    spec: ModelSpec
    source: Checkpoint
    values: dict[Place, torch.Tensor]
    product: torch.dtype

    @classmethod
    def of(cls, model: str, product: torch.dtype = torch.float32, device: str = "cpu") -> Teacher:
        """From MODEL, of any format. Raises ModelNotFoundError, CheckpointError, UnsupportedModelError."""
        source = open_checkpoint(resolve(model))
        spec, names = read_spec(source)
        values = network.read(Model(source, spec, names), matrices=product, device=device)
        return cls(spec, source, values, product)

    @torch.no_grad()
    def run(self, tokens: torch.Tensor, states: frozenset[int]) -> network.Reading:
        return network.run(self.spec, self.values, tokens, states=states, product=self.product)

    @torch.no_grad()
    def logits(self, last: torch.Tensor) -> torch.Tensor:
        head = self.values[network.head_of(self.spec)]
        return network.logits(self.spec, last, head, product=self.product)

    def check(self, student: Student) -> None:
        """Raise UsageError unless the student has the same tokens, with the same numbers."""
        if self.spec.vocab_size != student.spec.vocab_size:
            raise UsageError(
                f"The teacher has {self.spec.vocab_size} tokens and the student {student.spec.vocab_size}.",
                "Choose a student with the teacher's tokenizer.",
            )
        own, other = (Tokenizer.from_checkpoint(source) for source in (self.source, student.source))
        if own.backend.get_vocab() != other.backend.get_vocab():
            raise UsageError(
                "Teacher and student number their tokens differently.",
                "Choose a student with the teacher's tokenizer.",
            )
