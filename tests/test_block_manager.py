"""Blocks are named, hit, freed and evicted as prefix caching needs it, and nothing is lost on the way."""

from __future__ import annotations

import copy

import pytest
from integrity import check_blocks

from nanovllm import SamplingParams
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.sequence import Sequence

SIZE = 4


def sequence(*token_ids: int) -> Sequence:
    return Sequence(0, list(token_ids), SamplingParams(), seed=0)


def computed(manager: BlockManager, *token_ids: int) -> Sequence:
    """A sequence that has its blocks, all of its tokens being computed."""
    seq = sequence(*token_ids)
    manager.allocate(seq)
    manager.name_blocks(seq, seq.num_computed_tokens, seq.num_tokens)
    seq.num_computed_tokens = seq.num_tokens
    return seq


def num_free(manager: BlockManager) -> int:
    return len(manager.free_block_ids)


def test_the_hash_depends_on_the_parent_and_on_the_order():
    names = [
        BlockManager.compute_hash([1, 2, 3, 4]),
        BlockManager.compute_hash([1, 2, 4, 3]),
        BlockManager.compute_hash([1, 2, 3, 4], 0),
        BlockManager.compute_hash([1, 2, 3, 4], 7),
        BlockManager.compute_hash([1, 2, 3, 4], 2**64 - 1),
    ]
    assert len(set(names)) == len(names)
    assert names == [
        BlockManager.compute_hash([1, 2, 3, 4]),
        BlockManager.compute_hash([1, 2, 4, 3]),
        *(BlockManager.compute_hash([1, 2, 3, 4], parent) for parent in (0, 7, 2**64 - 1)),
    ]


def test_blocks_in_use_are_shared_and_counted():
    manager = BlockManager(8, SIZE)
    first = computed(manager, *range(10))
    second = computed(manager, *range(9), 99)
    assert second.block_table[:2] == first.block_table[:2] and second.block_table[2] != first.block_table[2]
    assert second.num_cached_tokens == second.num_computed_tokens - 2 == 8
    assert [manager.blocks[block_id].ref_count for block_id in first.block_table] == [2, 2, 1]
    assert num_free(manager) == 4
    manager.deallocate(first)
    check_blocks(manager, [second.block_table])
    assert num_free(manager) == 5
    manager.deallocate(second)
    check_blocks(manager, [])
    assert num_free(manager) == 8


def test_freed_blocks_are_hit():
    manager = BlockManager(8, SIZE)
    first = computed(manager, *range(10))
    blocks = first.block_table
    manager.deallocate(first)
    second = computed(manager, *range(10))
    assert second.block_table[:2] == blocks[:2] and second.num_cached_tokens == 8
    check_blocks(manager, [second.block_table])


def test_the_same_block_behind_another_prefix_is_no_hit():
    manager = BlockManager(8, SIZE)
    first = computed(manager, 1, 1, 1, 1, 5, 6, 7, 8, 0)
    second = computed(manager, 2, 2, 2, 2, 5, 6, 7, 8, 0)
    assert second.num_cached_tokens == 0 and not set(first.block_table) & set(second.block_table)


@pytest.mark.parametrize("length", [1, 4, 5, 8, 9])
def test_at_least_one_token_is_computed(length):
    manager = BlockManager(8, SIZE)
    first = computed(manager, *range(12))
    second = sequence(*range(length))
    manager.allocate(second)
    assert second.num_cached_tokens == (length - 1) // SIZE * SIZE
    assert second.block_table[: second.num_cached_tokens // SIZE] == first.block_table[: (length - 1) // SIZE]


def test_tokens_confirm_a_name(monkeypatch):
    """All blocks of all prefixes have the same hash here."""
    monkeypatch.setattr(BlockManager, "compute_hash", staticmethod(lambda token_ids, parent_hash=None: 7))
    manager = BlockManager(8, SIZE)
    first = computed(manager, 1, 2, 3, 4, 5)
    assert computed(manager, 1, 2, 3, 9, 5).num_cached_tokens == 0
    assert computed(manager, 1, 2, 3, 4, 5).block_table[0] == first.block_table[0]


def test_the_parent_confirms_a_name(monkeypatch):
    """Equal tokens behind different prefixes have the same hash here."""
    names = {(0, 0): 10, (1, 1): 11, (5, 5): 12}
    monkeypatch.setattr(
        BlockManager, "compute_hash", staticmethod(lambda token_ids, parent_hash=None: names[tuple(token_ids)])
    )
    manager = BlockManager(12, 2)
    computed(manager, 0, 0, 5, 5, 9)
    computed(manager, 1, 1, 9)
    assert computed(manager, 1, 1, 5, 5, 9).num_cached_tokens == 2
    assert computed(manager, 0, 0, 5, 5, 9).num_cached_tokens == 4


def test_an_equal_block_is_not_named_twice():
    manager = BlockManager(8, SIZE)
    first, second = sequence(*range(5)), sequence(*range(5))
    manager.allocate(first)
    manager.allocate(second)  # before the first one's block has a name
    manager.name_blocks(first, 0, 5)
    manager.name_blocks(second, 0, 5)
    assert list(manager.hash_to_block_id.values()) == first.block_table[:1]
    check_blocks(manager, [first.block_table, second.block_table])


def test_only_full_blocks_are_named():
    manager = BlockManager(8, SIZE)
    seq = sequence(*range(11))
    manager.allocate(seq)
    counts = []
    for start, end in [(0, 3), (3, 4), (4, 9), (9, 11)]:
        manager.name_blocks(seq, start, end)
        counts.append(len(manager.hash_to_block_id))
    assert counts == [0, 1, 2, 2]


def test_least_recently_used_blocks_are_evicted_first():
    manager = BlockManager(4, SIZE)
    old, new = computed(manager, 1, 1, 1, 1), computed(manager, 2, 2, 2, 2)
    manager.deallocate(old)
    manager.deallocate(new)
    manager.deallocate(computed(manager, 1, 1, 1, 1, 3))  # a hit: now `new` was used least recently
    computed(manager, 8, 8, 8, 8, 8, 8)  # takes the block that was never used and the least recently used one
    assert BlockManager.compute_hash([2, 2, 2, 2]) not in manager.hash_to_block_id
    assert computed(manager, 1, 1, 1, 1, 3).num_cached_tokens == 4


def test_the_tail_is_evicted_before_the_head():
    manager = BlockManager(3, SIZE)
    first = computed(manager, *range(12))
    head, middle, tail = first.block_table
    manager.deallocate(first)
    assert list(manager.free_block_ids) == [tail, middle, head]
    manager.deallocate(computed(manager, 99))
    assert computed(manager, *range(12)).num_cached_tokens == 8


def test_hits_are_not_evicted_for_the_same_sequence():
    manager = BlockManager(3, SIZE)
    manager.deallocate(computed(manager, *range(12)))
    second = computed(manager, *range(8), 9, 9)  # the blocks it hits are free, and it needs one more
    assert second.num_cached_tokens == 8 and len(set(second.block_table)) == 3
    check_blocks(manager, [second.block_table])


def test_a_failed_allocation_changes_nothing():
    manager = BlockManager(5, SIZE)
    in_use = computed(manager, *range(8))
    freed = computed(manager, *range(4), 5, 6, 7, 8)
    manager.deallocate(freed)
    waiting = sequence(*range(4), *range(5, 25))
    assert not manager.can_allocate(waiting)
    before = copy.deepcopy((manager.blocks, manager.hash_to_block_id, list(manager.free_block_ids)))
    with pytest.raises(RuntimeError, match="free blocks"):
        manager.allocate(waiting)
    assert (manager.blocks, manager.hash_to_block_id, list(manager.free_block_ids)) == before
    assert waiting.block_table == [] and waiting.num_computed_tokens == 0 and waiting.num_cached_tokens == -1
    check_blocks(manager, [in_use.block_table])


@pytest.mark.parametrize("num_tokens", [12, 13])
def test_can_allocate_says_what_allocate_does(num_tokens):
    """Free blocks that are hit count as needed, those in use do not: 3 + 1 blocks fit, 3 + 2 do not."""
    manager = BlockManager(4, SIZE)
    holder = computed(manager, *range(5))
    assert num_free(manager) == 2
    seq = sequence(*range(num_tokens))
    assert manager.can_allocate(seq) == (num_tokens == 12)
    if num_tokens == 12:
        manager.allocate(seq)
        assert num_free(manager) == 0
        check_blocks(manager, [holder.block_table, seq.block_table])


def test_append_opens_a_block_when_the_last_token_needs_one():
    manager = BlockManager(2, SIZE)
    seq = computed(manager, 1, 2, 3)
    opened = []
    for _ in range(5):
        seq.num_tokens += 1
        assert manager.can_append(seq)
        opened.append(manager.may_append(seq))
    assert opened == [0, 1, 0, 0, 0] and len(seq.block_table) == 2
    seq.num_tokens += 1  # the ninth token: no block is left
    assert not manager.can_append(seq)


def test_generated_tokens_are_cached():
    """A block that decoding filled is hit by the next turn of the chat."""
    manager = BlockManager(8, SIZE)
    seq = computed(manager, 1, 2, 3)
    for token_id in (4, 5):
        seq.token_ids.append(token_id)
        seq.num_tokens += 1
        manager.may_append(seq)
        manager.name_blocks(seq, seq.num_tokens - 2, seq.num_tokens - 1)
    manager.deallocate(seq)
    assert computed(manager, 1, 2, 3, 4, 5, 6).num_cached_tokens == 4


def test_reset_prefix_cache():
    manager = BlockManager(8, SIZE)
    in_use, freed = computed(manager, *range(8)), computed(manager, *range(20, 28))
    manager.deallocate(freed)
    manager.reset_prefix_cache()
    check_blocks(manager, [in_use.block_table])
    assert not manager.hash_to_block_id
    assert computed(manager, *range(20, 29)).num_cached_tokens == 0
    assert computed(manager, *range(9)).num_cached_tokens == 0


def test_without_prefix_caching_nothing_is_named():
    manager = BlockManager(8, SIZE, enable_prefix_caching=False)
    computed(manager, *range(9))
    assert computed(manager, *range(9)).num_cached_tokens == 0
    assert not manager.hash_to_block_id


def damage_count(manager, seq):
    manager.blocks[seq.block_table[0]].ref_count += 1


def damage_free_list(manager, seq):
    manager.free_block_ids.popitem()


def damage_names(manager, seq):
    manager.hash_to_block_id[123] = seq.block_table[1]


@pytest.mark.parametrize("damage", [damage_count, damage_free_list, damage_names])
def test_the_integrity_check_sees(damage):
    manager = BlockManager(8, SIZE)
    seq = computed(manager, *range(6))
    check_blocks(manager, [seq.block_table])
    damage(manager, seq)
    with pytest.raises(RuntimeError):
        check_blocks(manager, [seq.block_table])
