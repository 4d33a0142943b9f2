"""A smaller model proposes: it runs a few tokens ahead, and the model itself then checks them all in one step.

It keeps a line of its own for every sequence, with its own blocks, under a scheduler of its own, so that its prefill is
chunked and its memory bounded as the model's is. What a rejected draft left in its cache is overwritten.
"""

from __future__ import annotations

import time
from array import array

from miaotui.backends.ops import BLOCK_SIZE, Executor
from miaotui.engine.batch import Batch
from miaotui.engine.blocks import BlockManager
from miaotui.engine.draws import best_draws
from miaotui.engine.request import Sequence
from miaotui.engine.sampler import Sampler
from miaotui.engine.scheduler import Limits, Schedule, Scheduler
from miaotui.errors import UsageError
from miaotui.model.tokenizer import Tokenizer


class DraftProposer:
    """Drafts are drawn with the parameters and the random numbers of the sequence itself, which then often agrees.

    Owns the draft model's executor.
    """

    def __init__(self, executor: Executor, blocks: int, vocab_size: int) -> None:
        """`vocab_size` is the model's: padding may make the draft's larger."""
        shape = executor.shape
        executor.allocate_cache(blocks)
        self._executor = executor
        self._vocab_size = vocab_size
        self._sampler = Sampler(best_draws(executor), str)
        self._batch = Batch(shape)
        seats = min(shape.max_seqs, shape.max_logits_rows)
        # No prefix is looked up: blocks that drafts were written to must not be found by what was rejected.
        self._scheduler = Scheduler(
            BlockManager(blocks, prefix_caching=False), Limits(shape.max_tokens, seats, shape.max_logits_rows)
        )
        self._longest = min(shape.max_model_len, blocks * BLOCK_SIZE)
        self._lines: dict[Sequence, Sequence] = {}
        self._settled: dict[Sequence, int] = {}
        """How many of a line's tokens are known to be the sequence's; drafts follow."""
        self.cost = 0.0
        """Seconds of one token ahead, for all sequences together: a running average."""

    def offer(self, sequence: Sequence, longest: int) -> tuple[str, int] | None:
        room = min(longest, self._longest - len(sequence.tokens))
        return ("model", room) if room > 0 else None

    def propose(self, lengths: dict[Sequence, int]) -> dict[Sequence, list[int]]:
        """Drafts of at most these lengths. A line that is far behind catches up by and by, and has none meanwhile."""
        for idle in [known for known in self._lines if not known.blocks]:
            self.forget(idle)  # preempted: it gets another line when it is back
        drafts: dict[Sequence, list[int]] = {}
        owners = {self._line(sequence): sequence for sequence in lengths}
        for _ in range(max(lengths.values(), default=0)):
            plan = self._scheduler.schedule()
            if not plan.counts:
                break
            for line, token in self._run(plan):
                sequence = owners.get(line)
                if sequence is None or token >= self._vocab_size:
                    continue
                draft = drafts.setdefault(sequence, [])
                draft.append(token)
                if len(draft) < lengths[sequence]:
                    line.tokens.append(token)
        return drafts

    def forget(self, sequence: Sequence) -> None:
        line = self._lines.pop(sequence, None)
        if line is not None:
            del self._settled[sequence]
            self._scheduler.remove(line)

    def check_integrity(self) -> None:
        """Raise AssertionError unless every line is scheduled and the blocks add up."""
        self._scheduler.check_integrity()
        scheduled = self._scheduler.running + [line for _, line in self._scheduler.waiting]
        assert set(map(id, scheduled)) == set(map(id, self._lines.values())), "a line is lost, or outlives its sequence"

    def close(self) -> None:
        self._executor.close()

    def _line(self, sequence: Sequence) -> Sequence:
        """The sequence's line, with the sequence's tokens: drafts that were right stay computed."""
        line = self._lines.get(sequence)
        if line is None:
            line = Sequence(sequence.request, sequence.index, array("i", sequence.tokens))
            line.all_rows = False
            self._lines[sequence], self._settled[sequence] = line, len(line.tokens)
            self._scheduler.add(line)
            return line
        same, most = self._settled[sequence], min(len(line.tokens), len(sequence.tokens))
        while same < most and line.tokens[same] == sequence.tokens[same]:
            same += 1
        line.tokens[same:] = sequence.tokens[same:]
        self._settled[sequence] = len(line.tokens)
        self._scheduler.rewind(line, min(same, len(line.tokens) - 1))
        return line

    def _run(self, plan: Schedule) -> list[tuple[Sequence, int]]:
        """Run one step of the draft model; the next token of every line that has run all of its own."""
        started = time.perf_counter()
        logits = self._executor.run(self._batch.fill(plan))
        self._scheduler.complete(plan)
        ready = [line for line in plan.counts if line.remaining == 0]
        tokens = self._sampler.pick(logits, list(range(len(ready))), ready)
        if len(ready) == len(plan.counts) and sum(plan.counts.values()) <= 4 * len(ready):
            seconds = time.perf_counter() - started
            self.cost = seconds if self.cost == 0.0 else self.cost * 0.9 + seconds * 0.1
        return list(zip(ready, tokens, strict=True))


def check_same_tokens(draft: Tokenizer, target: Tokenizer, name: str) -> None:
    """Raise UsageError unless the draft model's token ids mean what the model's do."""
    ours, theirs = (tokenizer.backend.get_vocab(with_added_tokens=True) for tokenizer in (target, draft))
    if ours == theirs:
        return
    token, at = min(ours.items() ^ theirs.items(), key=lambda entry: entry[1])
    raise UsageError(
        f"The draft model {name} has another tokenizer: token {at} is {token!r:.40} in only one of the two.",
        "Choose a draft model of the same family.",
    )
