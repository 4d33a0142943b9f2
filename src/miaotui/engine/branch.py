"""One sequence becoming several: a request's `n` continuations, and the beams of a search.

A branch shares the full blocks of its parent and has its own copy of the partial last one.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable

from miaotui.backends.ops import Executor
from miaotui.engine.grammar import GrammarMask
from miaotui.engine.params import SamplingParams
from miaotui.engine.request import Request, Sequence
from miaotui.engine.scheduler import Scheduler


class Branches:
    """Forks sequences. `prepare` gives a new one its sampling state."""

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        prepare: Callable[[Sequence, GrammarMask | None], None],
    ) -> None:
        self._scheduler = scheduler
        self._executor = executor
        self._prepare = prepare

    def fan_out(self, sequence: Sequence) -> list[Sequence]:
        """All sequences that draw their next token from this one's logits: itself, but at a prompt's end all `n`."""
        request = sequence.request
        assert isinstance(request.params, SamplingParams)
        if request.params.n == len(request.sequences):
            return [sequence]
        for index in range(1, request.params.n):
            child = self._fork(sequence, index)
            self._prepare(child, sequence.grammar.fork() if sequence.grammar is not None else None)
        return list(request.sequences)

    def advance(self, request: Request) -> bool:
        """Move a search on once all its beams have made their offers. False when it has ended."""
        search = request.beam
        assert search is not None
        if not search.ready:
            return True
        chosen = search.choose()
        parents = {candidate.parent for candidate in chosen}
        for beam in request.sequences:
            if beam not in parents:
                self._scheduler.remove(beam)
                beam.finish_reason = search.finished[0].reason if search.finished else "stop"
        if not chosen:
            return False
        request.sequences = [beam for beam in request.sequences if beam in parents]
        grown: list[tuple[Sequence, int, float]] = []
        for candidate in chosen:
            beam = candidate.parent
            if beam in parents:
                parents.remove(beam)
            else:
                beam = self._fork(beam, request.sequences[-1].index + 1)
            grown.append((beam, candidate.token, candidate.total))
        for beam, token, _ in grown:
            beam.tokens.append(token)
        search.follow([(beam, total) for beam, _, total in grown])
        return True

    def _fork(self, parent: Sequence, index: int) -> Sequence:
        """A new sequence of the same request with the same tokens and, where there is room, the same cache."""
        child = Sequence(parent.request, index, array("i", parent.tokens))
        child.chain = list(parent.chain)
        parent.request.sequences.append(child)
        pair = self._scheduler.fork(parent, child)
        if pair is not None:
            self._executor.copy_blocks([pair])
        return child
