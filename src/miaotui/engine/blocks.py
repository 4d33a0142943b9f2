"""The KV cache's blocks: who holds which, what can be found again, what may be overwritten.

A block is in exactly one of three states, and `check_integrity` says so:

    held        one or more block tables list it (its reference count)
    cached      no table lists it, but its content is known by hash: it may be found again, or evicted, oldest first
    free        nothing is known of it

With a pager (paging.py) what is evicted goes to a file, and a prefix may be found there too.

Only full blocks whose positions have been computed are known by hash, so a shared block is never written to. The hash
is chained (blake2b over the parent's hash and the block's tokens, 128 bits): equal hashes mean equal prefixes.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable
from hashlib import blake2b
from typing import Protocol

from miaotui.backends.ops import BLOCK_SIZE

BlockTable = array
"""An `array('i')` of block numbers. Append-only: a changed table is a new array, so that identity means content."""
Place = int | bytes
"""Where a known block is: its number, or, for one that is with the pager, its hash."""


def blocks_for(positions: int) -> int:
    """How many blocks hold that many positions."""
    return -(-positions // BLOCK_SIZE)


def extend_chain(chain: list[bytes], tokens: array[int], blocks: int) -> None:
    """Grow `chain`, the hashes of the leading full blocks of `tokens`, to `blocks` entries."""
    for i in range(len(chain), blocks):
        parent = chain[-1] if chain else b""
        content = tokens[i * BLOCK_SIZE : (i + 1) * BLOCK_SIZE].tobytes()
        chain.append(blake2b(parent + content, digest_size=16).digest())


class Pager(Protocol):
    """Where the block manager sends what it evicts, by hash, and finds it again."""

    def __contains__(self, digest: bytes) -> bool: ...

    def save(self, digest: bytes, block: int) -> None:
        """Keep the content of a cache block that is about to be overwritten."""
        ...

    def load(self, digest: bytes, block: int) -> bool:
        """Fill a cache block. False when its content is no longer there, or is damaged."""
        ...


class BlockManager:
    """Owns every block of the cache. A table belongs to its sequence; only this class changes reference counts."""

    def __init__(self, blocks: int, prefix_caching: bool = True, pager: Pager | None = None) -> None:
        self.total = blocks
        self.prefix_caching = prefix_caching
        self._pager = pager
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

    def find(self, chain: list[bytes]) -> list[Place]:
        """Where the longest known prefix of `chain` is. Its blocks are not held yet."""
        found: list[Place] = []
        for digest in chain:
            block = self._block_of.get(digest)
            if block is not None:
                found.append(block)
            elif self._pager is not None and digest in self._pager:
                found.append(digest)
            else:
                break
        return found

    def can_hold(self, positions: int, found: list[Place]) -> bool:
        """Whether a sequence of `positions`, whose prefix is in `found`, fits beside what is held."""
        here = [place for place in found if isinstance(place, int)]
        idle = sum(self._references[block] == 0 for block in here)
        return blocks_for(positions) - len(here) <= self.available - idle

    def adopt(self, found: list[Place]) -> array[int]:
        """A new table that holds (shares) the blocks `found`; what is with the pager is loaded into blocks of its own.

        The table ends early where the pager no longer has a block.
        """
        here = [place for place in found if isinstance(place, int)]
        for block in here:
            self._hold(block)
        table = array("i")
        for place in found:
            taken = place if isinstance(place, int) else self._load(place)
            if taken is None:
                self.release(array("i", here[sum(isinstance(p, int) for p in found[: len(table)]) :]))
                break
            table.append(taken)
        return table

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
            digest = self._hash_of.pop(block)
            del self._block_of[digest]
            if self._pager is not None:
                self._pager.save(digest, block)
        self._references[block] = 1
        return block

    def _load(self, digest: bytes) -> int | None:
        """A held block with what the pager has under `digest`; None when it has it no longer, or it is damaged."""
        assert self._pager is not None
        block = self._take()
        if not self._pager.load(digest, block):
            self.release(array("i", [block]))
            return None
        self._block_of[digest], self._hash_of[block] = block, digest
        return block

    def _hold(self, block: int) -> None:
        if self._references[block] == 0:
            del self._cached[block]
        self._references[block] += 1

    def save_all(self) -> None:
        """Give everything that is known to the pager, the oldest first, before the cache goes away."""
        if self._pager is not None:
            idle = list(self._cached)
            for block in idle + [block for block in self._hash_of if block not in self._cached]:
                self._pager.save(self._hash_of[block], block)

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
