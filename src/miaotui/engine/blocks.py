"""The KV cache's blocks: who holds which, what can be found again, what may be overwritten.

A block is in exactly one of three states, and `check_integrity` says so:

    held        one or more block tables list it (its reference count)
    cached      no table lists it, but its content is known by hash: it may be found again, or evicted, oldest first
    free        nothing is known of it

Only full blocks whose positions have been computed are known by hash, so a shared block is never written to. The hash
is chained (blake2b over the parent's hash and the block's tokens, 128 bits): equal hashes mean equal prefixes.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable
from hashlib import blake2b

from miaotui.backends.ops import BLOCK_SIZE

BlockTable = array
"""An `array('i')` of block numbers. Append-only: a changed table is a new array, so that identity means content."""


def blocks_for(positions: int) -> int:
    """How many blocks hold that many positions."""
    return -(-positions // BLOCK_SIZE)


def extend_chain(chain: list[bytes], tokens: array[int], blocks: int) -> None:
    """Grow `chain`, the hashes of the leading full blocks of `tokens`, to `blocks` entries."""
    for i in range(len(chain), blocks):
        parent = chain[-1] if chain else b""
        content = tokens[i * BLOCK_SIZE : (i + 1) * BLOCK_SIZE].tobytes()
        chain.append(blake2b(parent + content, digest_size=16).digest())


class BlockManager:
    """Owns every block of the cache. A table belongs to its sequence; only this class changes reference counts."""

    def __init__(self, blocks: int, prefix_caching: bool = True) -> None:
        self.total = blocks
        self.prefix_caching = prefix_caching
        self._free = list(range(blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._references = [0] * blocks
        self._block_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}

    @property
    def available(self) -> int:
        """Blocks that can be handed out now."""
        return len(self._free) + len(self._cached)

    def grow(self, table: array[int], positions: int) -> bool:
        """Append blocks to `table` until it holds `positions`. All or nothing: False leaves it as it was."""
        missing = blocks_for(positions) - len(table)
        if missing > self.available:
            return False
        for _ in range(missing):
            table.append(self._take())
        return True

    def release(self, table: array[int]) -> None:
        """Give a table's blocks back, the last first, so that a prefix outlives what follows it."""
        for block in reversed(table):
            self._references[block] -= 1
            if self._references[block] == 0:
                if block in self._hash_of:
                    self._cached[block] = None
                else:
                    self._free.append(block)

    def find(self, chain: list[bytes]) -> list[int]:
        """The blocks that hold the longest known prefix of `chain`. They are not held yet."""
        found: list[int] = []
        for digest in chain:
            block = self._block_of.get(digest)
            if block is None:
                break
            found.append(block)
        return found

    def can_hold(self, positions: int, found: list[int]) -> bool:
        """Whether a sequence of `positions`, whose prefix is in `found`, fits beside what is held."""
        idle = sum(self._references[block] == 0 for block in found)
        return blocks_for(positions) - len(found) <= self.available - idle

    def adopt(self, found: list[int]) -> array[int]:
        """A new table that holds (shares) the blocks `found`."""
        for block in found:
            self._hold(block)
        return array("i", found)

    def remember(self, table: array[int], chain: list[bytes], first: int, last: int) -> None:
        """Make the blocks first … last-1 of `table`, now full and computed, findable by their hashes in `chain`."""
        for i in range(first, last):
            if chain[i] not in self._block_of and table[i] not in self._hash_of:
                self._block_of[chain[i]] = table[i]
                self._hash_of[table[i]] = chain[i]

    def fork(self, table: array[int], positions: int) -> tuple[array[int], tuple[int, int] | None] | None:
        """A second table for the same first `positions`: full blocks shared, a partial last one to be copied.

        Returns the table and the pair (source, destination) to copy, if any; None when no block is left for the copy.
        """
        full = positions // BLOCK_SIZE
        partial = positions % BLOCK_SIZE > 0
        if partial and self.available == 0:
            return None
        branch = self.adopt(list(table[:full]))
        if not partial:
            return branch, None
        branch.append(self._take())
        return branch, (table[full], branch[full])

    def _take(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            del self._block_of[self._hash_of.pop(block)]
        self._references[block] = 1
        return block

    def _hold(self, block: int) -> None:
        if self._references[block] == 0:
            del self._cached[block]
        self._references[block] += 1

    def check_integrity(self, tables: Iterable[array[int]]) -> None:
        """Raise AssertionError unless every block is in one state and `tables` are all that hold any."""
        held: Counter[int] = Counter()
        for table in tables:
            assert len(set(table)) == len(table), "a table lists a block twice"
            held.update(table)
        assert all(0 <= block < self.total for block in held)
        assert [held[block] for block in range(self.total)] == self._references, "reference counts do not add up"
        free, cached = set(self._free), set(self._cached)
        assert len(free) == len(self._free), "a block is free twice"
        assert not free & cached, "a block is free and cached"
        assert not (free | cached) & held.keys(), "a block is held and not held"
        assert len(free) + len(cached) + len(held) == self.total, "a block is lost"
        assert {b: h for h, b in self._block_of.items()} == self._hash_of, "hashes and blocks disagree"
        assert len(self._block_of) == len(self._hash_of)
        assert not free & self._hash_of.keys(), "a free block is known"
        assert cached <= self._hash_of.keys(), "a cached block is not known"
        assert not self._hash_of or self.prefix_caching
