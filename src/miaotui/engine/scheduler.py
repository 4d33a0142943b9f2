"""Who runs in the next step, with how many tokens. Knows requests, blocks and budgets; knows no tensors.

One token budget per step is shared by decodes (first) and prefill chunks, each in order of urgency: priority (smaller
is more urgent), then arrival. When blocks run out, the least urgent sequence is preempted: its blocks go back, and it
is recomputed later, minus what it finds again as a cached prefix.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

from miaotui.backends.ops import BLOCK_SIZE
from miaotui.engine.blocks import BlockManager, Place, blocks_for, extend_chain
from miaotui.engine.request import Sequence


@dataclass(frozen=True)
class Limits:
    """The most that one step may hold. `max_rows` bounds the rows whose logits are asked for."""

    max_tokens: int
    max_seqs: int
    max_rows: int


@dataclass(slots=True)
class Schedule:
    """One step's work: each sequence with the number of its tokens to run. Insertion order is row order."""

    budget: int
    rows: int
    counts: dict[Sequence, int] = field(default_factory=dict)
    admitted: list[Sequence] = field(default_factory=list)
    """Those that came from waiting; what a prefix gave them is already computed."""
    drafts: dict[Sequence, list[int]] = field(default_factory=dict)
    """Guesses at what follows a sequence's tokens: run and counted with them, and computed when they came true."""
    steps: int = 1
    """How many steps of one token to run at once."""

    def add(self, sequence: Sequence, count: int) -> None:
        self.counts[sequence] = count
        self.budget -= count
        self.rows -= count if sequence.all_rows else 1

    def drop(self, sequence: Sequence) -> None:
        count = self.counts.pop(sequence, 0)
        self.budget += count
        self.rows += (count if sequence.all_rows else 1) if count else 0


class Scheduler:
    """Owns the order of work: `waiting` sequences hold no blocks, `running` ones do."""

    def __init__(self, blocks: BlockManager, limits: Limits) -> None:
        self.blocks = blocks
        self.limits = limits
        self.waiting: list[tuple[tuple[int, int, int], Sequence]] = []
        self.running: list[Sequence] = []
        self.preemptions = 0
        self.prefix_queries = 0
        self.prefix_hits = 0

    def add(self, sequence: Sequence) -> None:
        heapq.heappush(self.waiting, (sequence.rank, sequence))

    def schedule(self) -> Schedule:
        """Choose the next step's work and give it its blocks. Empty only when there is nothing to do."""
        plan = Schedule(self.limits.max_tokens, self.limits.max_rows)
        preempted = self.preemptions
        for sequence in sorted(self.running, key=_decodes_first):
            if sequence.blocks and sequence.remaining:
                self._extend(plan, sequence)
        if self.waiting and (preempted == self.preemptions or not plan.counts):
            self._admit(plan)
        return plan

    def draft(self, plan: Schedule, sequence: Sequence, tokens: list[int]) -> list[int]:
        """Run guesses after a sequence's last token: as many as the step, its rows and the blocks have room for."""
        assert sequence.computed + plan.counts[sequence] == len(sequence.tokens), "a guess at what is known"
        fitting = tokens[: max(0, min(len(tokens), plan.budget, plan.rows))]
        if not fitting or not self.blocks.grow(sequence.blocks, len(sequence.tokens) + len(fitting)):
            return []
        plan.counts[sequence] += len(fitting)
        plan.budget -= len(fitting)
        plan.rows -= len(fitting)
        plan.drafts[sequence] = fitting
        return fitting

    def run_on(self, plan: Schedule, steps: int) -> None:
        """Have a step of one token a sequence go on to `steps` of them, where nobody waits and blocks are there."""
        lengths = [(sequence, len(sequence.tokens) + steps - 1) for sequence in plan.counts]
        needed = sum(blocks_for(length) - len(sequence.blocks) for sequence, length in lengths)
        if self.waiting or needed > self.blocks.available:
            return
        for sequence, length in lengths:
            self.blocks.grow(sequence.blocks, length)
        plan.steps = steps

    def complete(self, plan: Schedule) -> None:
        """Note that the step has run: its tokens are computed, and blocks that became full can be found again."""
        for sequence, count in plan.counts.items():
            self.advance(sequence, count - len(plan.drafts.get(sequence, ())))

    def advance(self, sequence: Sequence, count: int) -> None:
        """`count` more of a sequence's tokens are computed: they have run, or their drafts came true."""
        before, sequence.computed = sequence.computed, sequence.computed + count
        first, last = before // BLOCK_SIZE, sequence.computed // BLOCK_SIZE
        if last > first and self.blocks.prefix_caching:
            extend_chain(sequence.chain, sequence.tokens, last)
            self.blocks.remember(sequence.blocks, sequence.chain, first, last)

    def rewind(self, sequence: Sequence, computed: int) -> None:
        """Nothing beyond `computed` is of use any more; blocks beyond the sequence's tokens go back."""
        sequence.computed = min(sequence.computed, computed)
        needed = blocks_for(len(sequence.tokens))
        if len(sequence.blocks) > needed:
            self.blocks.release(sequence.blocks[needed:])
            sequence.blocks = sequence.blocks[:needed]

    def fork(self, parent: Sequence, child: Sequence) -> tuple[int, int] | None:
        """Start `child` where `parent` is, sharing its blocks; returns the pair of blocks to copy, if any.

        A child without a seat or a block waits, and is computed like a preempted sequence.
        """
        seat = len(self.running) < self.limits.max_seqs
        forked = self.blocks.fork(parent.blocks, parent.computed) if seat and parent.blocks else None
        if forked is None:
            self.add(child)
            return None
        child.blocks, pair = forked
        child.computed = parent.computed
        self.running.append(child)
        return pair

    def remove(self, sequence: Sequence) -> None:
        """Forget a finished or cancelled sequence and give its blocks back."""
        if sequence in self.running:
            self.running.remove(sequence)
            self._release(sequence)
        else:
            self.waiting = [entry for entry in self.waiting if entry[1] is not sequence]
            heapq.heapify(self.waiting)

    def _extend(self, plan: Schedule, sequence: Sequence) -> None:
        count = min(sequence.remaining, plan.budget)
        if sequence.all_rows:
            count = min(count, plan.rows)
        if count <= 0 or plan.rows <= 0:
            return
        while not self.blocks.grow(sequence.blocks, sequence.computed + count):
            victim = max(self.running, key=_rank)
            self._preempt(plan, victim)
            if victim is sequence:
                return
        plan.add(sequence, count)

    def _admit(self, plan: Schedule) -> None:
        while self.waiting:
            sequence = self.waiting[0][1]
            found = self._make_room(plan, sequence)
            if found is None:
                return
            heapq.heappop(self.waiting)
            self.running.append(sequence)
            sequence.blocks = self.blocks.adopt(found)
            sequence.computed = len(sequence.blocks) * BLOCK_SIZE
            self.prefix_queries += len(sequence.tokens)
            self.prefix_hits += sequence.computed
            plan.admitted.append(sequence)
            self._extend(plan, sequence)

    def _make_room(self, plan: Schedule, sequence: Sequence) -> list[Place] | None:
        """Cached blocks of the sequence's prefix once the step has room and all its tokens fit; None: it must wait.

        It may push out sequences of lower priority; and, should nothing else be able to run, any less urgent one.
        """
        while True:
            found = self._find_prefix(sequence)
            seat = plan.budget > 0 and plan.rows > 0 and len(self.running) < self.limits.max_seqs
            if seat and self.blocks.can_hold(len(sequence.tokens), found):
                return found
            victim = max(self.running, key=_rank, default=None)
            if victim is None or not (
                victim.rank[0] > sequence.rank[0] or (not plan.counts and victim.rank > sequence.rank)
            ):
                return None
            self._preempt(plan, victim)

    def _find_prefix(self, sequence: Sequence) -> list[Place]:
        """Known full blocks, short of the last token: its logits are wanted, so it is always run."""
        if sequence.all_rows or not self.blocks.prefix_caching:
            return []
        full = (len(sequence.tokens) - 1) // BLOCK_SIZE
        extend_chain(sequence.chain, sequence.tokens, full)
        return self.blocks.find(sequence.chain[:full])

    def _preempt(self, plan: Schedule, victim: Sequence) -> None:
        plan.drop(victim)
        self.running.remove(victim)
        self._release(victim)
        self.add(victim)
        self.preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        self.blocks.release(sequence.blocks)
        sequence.blocks = sequence.blocks[:0]
        sequence.computed = 0

    def check_integrity(self) -> None:
        """Raise AssertionError unless every sequence is in one place with blocks for what it has computed."""
        waiting = [sequence for _, sequence in self.waiting]
        everyone = self.running + waiting
        assert len(set(map(id, everyone))) == len(everyone), "a sequence is in two places"
        assert len(self.running) <= self.limits.max_seqs, "more sequences run than may"
        assert all(not s.blocks and s.computed == 0 for s in waiting), "a waiting sequence holds blocks"
        for sequence in self.running:
            assert 0 <= sequence.computed <= len(sequence.tokens), "more is computed than there is"
            assert len(sequence.blocks) >= blocks_for(sequence.computed), "computed positions have no block"
            assert len(sequence.blocks) <= blocks_for(len(sequence.tokens)), "a sequence holds blocks it does not need"
        assert all(s.finish_reason is None for s in everyone), "a finished sequence is still scheduled"
        assert all(len(s.chain) <= len(s.tokens) // BLOCK_SIZE for s in everyone)
        self.blocks.check_integrity(sequence.blocks for sequence in self.running)


def _rank(sequence: Sequence) -> tuple[int, int, int]:
    return sequence.rank


def _decodes_first(sequence: Sequence) -> tuple[bool, tuple[int, int, int]]:
    return sequence.remaining > 1, sequence.rank
