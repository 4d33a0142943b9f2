"""Turns a schedule into a `Step`: index arrays, allocated once and refilled."""

from __future__ import annotations

from array import array

import numpy as np
from numpy.typing import NDArray

from miaotui.backends.ops import Step, StepShape
from miaotui.engine.blocks import blocks_for
from miaotui.engine.request import Sequence
from miaotui.engine.scheduler import Schedule

Indices = NDArray[np.int32]


def rows_wanted(plan: Schedule, sequence: Sequence, ready: bool) -> int:
    """How many of a sequence's last rows in the step have their logits computed.

    All of them where that was asked for; else, when it has then run all of its own (`ready`), its last token's and
    its drafts'.
    """
    if sequence.all_rows:
        return plan.counts[sequence]
    return 1 + len(plan.drafts.get(sequence, ())) if ready else 0


class Batch:
    """Owns the arrays that a `Step` views; a step is valid until the next `fill`.

    Rows of the block table are kept from step to step: a row is rewritten only when another table takes it, and
    extended when its table has grown. That works because a table is append-only (blocks.py).
    """

    def __init__(self, shape: StepShape) -> None:
        width = blocks_for(shape.max_model_len)
        self._tokens: Indices = np.zeros(shape.max_tokens, np.int32)
        self._positions: Indices = np.zeros(shape.max_tokens, np.int32)
        self._every_position: Indices = np.arange(shape.max_model_len, dtype=np.int32)
        self._query_start: Indices = np.zeros(shape.max_seqs + 1, np.int32)
        self._context_len: Indices = np.zeros(shape.max_seqs, np.int32)
        self._rows: Indices = np.zeros(shape.max_logits_rows, np.int32)
        self._block_table: Indices = np.zeros((shape.max_seqs, width), np.int32)
        self._row_table: list[array[int] | None] = [None] * shape.max_seqs
        self._row_len = [0] * shape.max_seqs

    def fill(self, plan: Schedule) -> Step:
        """The step that runs `plan`. Logits rows: see `rows_wanted`."""
        token_count, row_count, seqs = 0, 0, 0
        for sequence, count in plan.counts.items():
            start, end = sequence.computed, sequence.computed + count
            if count == 1:
                self._tokens[token_count] = sequence.tokens[start]
                self._positions[token_count] = start
            else:
                draft = plan.drafts.get(sequence, [])
                self._tokens[token_count : token_count + count - len(draft)] = sequence.tokens[start:end]
                self._tokens[token_count + count - len(draft) : token_count + count] = draft
                self._positions[token_count : token_count + count] = self._every_position[start:end]
            wanted = rows_wanted(plan, sequence, end >= len(sequence.tokens))
            token_count += count
            if wanted == 1:  # nearly always, and cheaper than a slice
                self._rows[row_count] = token_count - 1
            elif wanted:
                self._rows[row_count : row_count + wanted] = range(token_count - wanted, token_count)
            row_count += wanted
            self._context_len[seqs] = end
            self._sync_row(seqs, sequence)
            seqs += 1
            self._query_start[seqs] = token_count
        return Step(
            tokens=self._tokens[:token_count],
            positions=self._positions[:token_count],
            query_start=self._query_start[: seqs + 1],
            context_len=self._context_len[:seqs],
            block_table=self._block_table[:seqs],
            logits_rows=self._rows[:row_count],
            greedy=all(sequence.plain for sequence in plan.counts),
        )

    def _sync_row(self, row: int, sequence: Sequence) -> None:
        table, known = sequence.blocks, self._row_len[row]
        length = len(table)
        if self._row_table[row] is not table:
            self._row_table[row] = table
            self._block_table[row, length:known] = 0
            known = 0
        if length > known:
            self._block_table[row, known:length] = table[known:]
        self._row_len[row] = length
