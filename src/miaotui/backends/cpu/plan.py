"""From recorded nodes to a native program: fuse what can be fused, give every value a place, emit the ops.

Fusing changes no bit of the result: a norm computed inside the linear that reads it, or an activation inside the
linear that feeds it, is the same kernel in another place. `fuse=False` keeps every node for itself, as the twin.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeGuard

from miaotui.backends.cpu._native import row_stride
from miaotui.backends.cpu.nodes import ActivateNode, LinearNode, Node, NormNode, Value
from miaotui.backends.cpu.weights import Linear
from miaotui.backends.ops import StepShape

ALIGN = 16
"""Floats: a place begins on a cache line."""


def fused(nodes: list[Node], quantised: bool) -> list[Node]:
    """Norms into the linear behind them, activations into the linear before them, where nobody else looks; and, where
    activations are quantised, the quantising of one linear's result into that linear."""
    readers: dict[Value, int] = {}
    for node in nodes:
        for value in node.inputs:
            readers[value] = readers.get(value, 0) + 1
    made_by: dict[Value, Node] = {}
    kept: list[Node] = []
    for node in nodes:
        source = made_by.get(node.inputs[0]) if node.inputs else None
        alone = source is not None and readers[source.output] == 1
        if alone and isinstance(node, LinearNode) and isinstance(source, NormNode) and len(source.inputs) == 1:
            kept.remove(source)
            node = replace(node, inputs=[source.inputs[0], *node.inputs[1:]], norm=source.weight)
        elif alone and isinstance(node, ActivateNode) and isinstance(source, LinearNode) and _takes(source, node):
            kept.remove(source)
            node = replace(source, output=node.output, activation=node.activation, gated=node.gated)
        elif alone and quantised and _hands_on(source) and _takes_handed(node):
            source.hands_on = node.handed = True
        kept.append(node)
        made_by[node.output] = node
    return kept


def _hands_on(linear: Node | None) -> TypeGuard[LinearNode]:
    """Whether its result can leave quantised: whole groups of columns of integer weights, whose own input is coded as
    the next one's is."""
    if not isinstance(linear, LinearNode):
        return False
    parts = linear.weight.parts
    one = len(parts) == 1 or linear.gated
    return one and not linear.exact and parts[0].height % 32 == 0 and all(p.in_groups for p in parts)


def _takes_handed(linear: Node) -> TypeGuard[LinearNode]:
    """Whether all that it multiplies is integer and its input comes as it is."""
    if not isinstance(linear, LinearNode):
        return False
    parts = linear.weight.parts
    plain = linear.norm is None and not linear.exact
    return plain and all(p.perm is None and p.in_groups for p in parts)


def _takes(linear: LinearNode, activate: ActivateNode) -> bool:
    """Whether the linear can apply this activation on its way out."""
    plain = len(linear.inputs) == 1 and linear.scale == 1.0 and linear.softcap == 0.0 and linear.activation is None
    if not plain or not activate.gated:
        return plain
    parts = linear.weight.parts
    alike = len(parts) == 2 and parts[0].height == parts[1].height and _same_input(linear.weight, 0, 1)
    return alike and parts[0].perm is None


def split_inputs(nodes: list[Node]) -> list[tuple[Node, list[int]]]:
    """Each node with the indices of the weight parts it multiplies: parts of one linear whose inputs come in
    different orders (GPTQ's g_idx), or are coded differently, become ops of their own, writing side by side."""
    out: list[tuple[Node, list[int]]] = []
    for node in nodes:
        if not isinstance(node, LinearNode):
            out.append((node, []))
            continue
        groups: list[list[int]] = []
        for index in range(len(node.weight.parts)):
            same = next((g for g in groups if _same_input(node.weight, g[0], index)), None)
            if same is None:
                groups.append([index])
            else:
                same.append(index)
        out += [(node, group) for group in groups]
    return out


def _same_input(weight: Linear, a: int, b: int) -> bool:
    if weight.parts[a].packed.by_token != weight.parts[b].packed.by_token:
        return False
    p, q = weight.parts[a].perm, weight.parts[b].perm
    return (p is None and q is None) or (p is not None and q is not None and bool((p == q).all()))


@dataclass
class Places:
    """Offsets (in floats) of every value in the arena, and its size."""

    offset: dict[Value, int]
    floats: int


def place(nodes: list[Node], shape: StepShape, extra: list[int]) -> tuple[Places, list[int]]:
    """First-fit places by lifetime. `extra` are sizes that live throughout; their offsets come second.

    A linear may write over the residual that it adds when nothing reads that afterwards: each element is read
    before it is written, by the same thread.
    """
    last_use: dict[Value, int] = {}
    for index, node in enumerate(nodes):
        for value in (*node.inputs, node.output):
            last_use[value] = index
    arena = _Arena()
    lasting = [arena.take(size) for size in extra]
    offset: dict[Value, int] = {}
    for index, node in enumerate(nodes):
        if node.output not in offset:
            over = _overwritten(node, index, last_use)
            if over is not None:
                offset[node.output] = offset[over]
                arena.rename(offset[over], _floats(node.output, shape))
            else:
                offset[node.output] = arena.take(_floats(node.output, shape))
        for value in {id(v): v for v in node.inputs}.values():
            inherited = offset[value] == offset[node.output] and value is not node.output
            if last_use[value] == index and not inherited:
                arena.give_back(offset[value])
    return Places(offset, arena.size), lasting


def _overwritten(node: Node, index: int, last_use: dict[Value, int]) -> Value | None:
    if isinstance(node, LinearNode) and len(node.inputs) == 2 and node.inputs[1] is not node.inputs[0]:
        residual = node.inputs[1]
        if last_use[residual] == index and residual.width == node.output.width:
            return residual
    return None


def _floats(value: Value, shape: StepShape) -> int:
    rows = shape.max_logits_rows if value.of_logits else shape.max_tokens
    return -(-rows * int(row_stride(value.width)) // ALIGN) * ALIGN


class _Arena:
    """First fit over the gaps between places in use."""

    def __init__(self) -> None:
        self.used: dict[int, int] = {}
        self.size = 0

    def take(self, floats: int) -> int:
        begin = 0
        for offset in sorted(self.used):
            if offset - begin >= floats:
                break
            begin = offset + self.used[offset]
        self.used[begin] = -(-floats // ALIGN) * ALIGN
        self.size = max(self.size, begin + self.used[begin])
        return begin

    def rename(self, offset: int, floats: int) -> None:
        assert self.used[offset] >= floats, "a result is larger than the residual it replaces"

    def give_back(self, offset: int) -> None:
        del self.used[offset]
