"""The block manager by itself: sharing, eviction order, forks, and what its integrity check notices."""

from __future__ import annotations

from array import array

import pytest

from miaotui.backends.ops import BLOCK_SIZE
from miaotui.engine.blocks import BlockManager, blocks_for, extend_chain


def filled(manager: BlockManager, tokens: list[int]) -> tuple[array[int], list[bytes]]:
    """A table for `tokens` whose full blocks are known."""
    table, chain = array("i"), []
    assert manager.grow(table, len(tokens))
    extend_chain(chain, array("i", tokens), len(tokens) // BLOCK_SIZE)
    manager.remember(table, chain, 0, len(chain))
    return table, chain


def test_growth_is_all_or_nothing() -> None:
    manager = BlockManager(4)
    table = array("i")
    assert manager.grow(table, 33)
    assert len(table) == blocks_for(33) == 3
    assert not manager.grow(array("i"), 32)
    assert manager.available == 1
    manager.check_integrity([table])


def test_equal_prefixes_are_found_and_shared() -> None:
    manager = BlockManager(8)
    table, chain = filled(manager, list(range(40)))
    found = manager.find(chain)
    assert found == list(table[:2])
    shared = manager.adopt(found)
    manager.check_integrity([table, shared])
    manager.release(table)
    manager.check_integrity([shared])
    assert manager.available == 6
    other: list[bytes] = []
    extend_chain(other, array("i", [1, *range(1, 40)]), 2)
    assert manager.find(other) == []
    assert other[1] != chain[1], "the chain carries the prefix"


def test_the_oldest_and_deepest_is_evicted_first() -> None:
    manager = BlockManager(6)
    first, first_chain = filled(manager, list(range(48)))
    second, second_chain = filled(manager, list(range(100, 148)))
    manager.release(first)
    manager.release(second)
    assert manager.available == 6
    taken = array("i")
    manager.grow(taken, 32)
    assert len(manager.find(first_chain)) == 1, "its last two blocks went"
    assert len(manager.find(second_chain)) == 3
    manager.check_integrity([taken])


def test_idle_prefix_blocks_do_not_count_twice() -> None:
    manager = BlockManager(3)
    table, chain = filled(manager, list(range(32)))
    manager.release(table)
    found = manager.find(chain)
    assert manager.can_hold(48, found)
    assert not manager.can_hold(49, found)


def test_a_fork_copies_only_the_partial_block() -> None:
    manager = BlockManager(5)
    table, _ = filled(manager, list(range(40)))
    forked = manager.fork(table, 40)
    assert forked is not None
    branch, pair = forked
    assert branch[:2] == table[:2]
    assert pair == (table[2], branch[2])
    even = manager.fork(table, 32)
    assert even is not None
    assert even[1] is None
    assert manager.grow(array("i"), 16)
    assert manager.fork(table, 40) is None


def test_a_twin_computed_at_the_same_time_stays_private() -> None:
    manager = BlockManager(4)
    first, chain = filled(manager, list(range(16)))
    second, _ = filled(manager, list(range(16)))
    assert manager.find(chain) == [first[0]]
    manager.release(second)
    manager.check_integrity([first])
    assert manager.available == 3


def test_the_check_notices_a_leak_and_a_double_use() -> None:
    manager = BlockManager(4)
    table, _ = filled(manager, list(range(20)))
    with pytest.raises(AssertionError, match="reference counts"):
        manager.check_integrity([])
    with pytest.raises(AssertionError, match="reference counts"):
        manager.check_integrity([table, table])
