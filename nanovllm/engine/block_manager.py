"""Bookkeeping of the paged KV cache: which block holds which tokens of whom, and prefix caching.

Paging follows PagedAttention (arXiv 2309.06180). A full block is named by the hash of its parent block's hash and its
own tokens, so that one name stands for a whole prefix; xxhash finds a name, parent and tokens confirm it. A freed
block keeps its contents and its name until it is handed out again, the least recently used first. Every operation
takes O(1) a block. The device's memory is not touched here.
"""

from array import array
from collections import OrderedDict
from dataclasses import dataclass

import xxhash

from nanovllm.engine.sequence import BlockName, Sequence


@dataclass(slots=True)
class Block:
    """How many sequences hold a block, and its name while others can hit it."""

    ref_count: int = 0
    name: BlockName | None = None


class BlockManager:
    """Hands out the blocks of the KV cache."""

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        """`num_blocks` blocks of `block_size` tokens, all free."""
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.blocks = [Block() for _ in range(num_blocks)]
        self.hash_to_block_id: dict[int, int] = {}
        # Ordered by time of release: the first is the least recently used.
        self.free_block_ids: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))

    @staticmethod
    def compute_hash(token_ids: list[int], parent_hash: int | None = None) -> int:
        """The 64-bit hash of a block with these tokens behind the block `parent_hash` (None: it is the first)."""
        numbers = token_ids if parent_hash is None else [parent_hash, *token_ids]
        return xxhash.xxh64_intdigest(array("Q", numbers))

    def can_allocate(self, seq: Sequence, num_ahead: int = 0) -> bool:
        """Whether there are blocks for all of a waiting sequence's tokens, and for `num_ahead` that may follow."""
        return self._fits(seq, self._find_cached(seq), num_ahead)

    def allocate(self, seq: Sequence, num_ahead: int = 0) -> None:
        """Gives a waiting sequence the blocks of `can_allocate`, cached ones for as much of its prefix as there are.

        Raises:
            RuntimeError: too few blocks are free; nothing has changed then.
        """
        cached = self._find_cached(seq)
        if not self._fits(seq, cached, num_ahead):
            raise RuntimeError(f"{seq.num_tokens} tokens do not fit into {len(self.free_block_ids)} free blocks")
        # The cached ones first: taking fresh ones could evict them.
        for block_id in cached:
            self.free_block_ids.pop(block_id, None)
            self.blocks[block_id].ref_count += 1
        num_fresh = self._num_blocks(seq, num_ahead) - len(cached)
        seq.block_table = cached + [self._take_free() for _ in range(num_fresh)]
        seq.num_computed_tokens = len(cached) * self.block_size
        if seq.num_cached_tokens < 0:
            seq.num_cached_tokens = seq.num_computed_tokens

    def num_lacking(self, seq: Sequence, num_ahead: int) -> int:
        """How many more blocks a running sequence needs for its tokens and `num_ahead` that may follow."""
        return max(self._num_blocks(seq, num_ahead) - len(seq.block_table), 0)

    def can_append(self, seq: Sequence, num_ahead: int = 0) -> bool:
        """Whether a running sequence has, or can get, the blocks of its tokens and of `num_ahead` that may follow."""
        return self.num_lacking(seq, num_ahead) <= len(self.free_block_ids)

    def may_append(self, seq: Sequence, num_ahead: int = 0) -> int:
        """Gives a running sequence the blocks that it lacks, once `can_append` has said that there are enough.

        Returns how many, mostly one or none.
        """
        num_lacking = self.num_lacking(seq, num_ahead)
        seq.block_table += [self._take_free() for _ in range(num_lacking)]
        return num_lacking

    def deallocate(self, seq: Sequence) -> None:
        """Takes a sequence's blocks back. Named ones can still be hit, its tail being evicted before its head."""
        for block_id in reversed(seq.block_table):
            self.blocks[block_id].ref_count -= 1
            if self.blocks[block_id].ref_count == 0:
                self.free_block_ids[block_id] = None
        seq.block_table = []
        seq.num_computed_tokens = 0

    def name_blocks(self, seq: Sequence, start: int, end: int) -> None:
        """Names the blocks that became full when tokens [start, end) were computed, so that others can hit them."""
        if not self.enable_prefix_caching and seq.cache_salt is None:
            return
        for index in range(start // self.block_size, end // self.block_size):
            name = self._block_name(seq, index)
            if name.hash not in self.hash_to_block_id:  # else an equal block has the name, perhaps this one
                self.hash_to_block_id[name.hash] = seq.block_table[index]
                self.blocks[seq.block_table[index]].name = name

    def reset_prefix_cache(self) -> None:
        """Forgets all names; blocks in use stay with their sequences."""
        for block_id in self.hash_to_block_id.values():
            self.blocks[block_id].name = None
        self.hash_to_block_id.clear()

    def _num_blocks(self, seq: Sequence, num_ahead: int) -> int:
        """The blocks that hold all of a sequence's tokens and `num_ahead` more, the last one perhaps in part."""
        return -(-(seq.num_tokens + num_ahead) // self.block_size)

    def _fits(self, seq: Sequence, cached: list[int], num_ahead: int) -> bool:
        """Whether the free blocks suffice; of the cached ones, only those in use need none."""
        num_in_use = sum(self.blocks[block_id].ref_count > 0 for block_id in cached)
        return self._num_blocks(seq, num_ahead) - num_in_use <= len(self.free_block_ids)

    def _block_name(self, seq: Sequence, index: int) -> BlockName:
        """The name of a sequence's full block, which needs those of the blocks before it."""
        for i in range(len(seq.block_names), index + 1):
            parent_hash = seq.block_names[-1].hash if i else seq.cache_salt
            token_ids = seq.token_ids[i * self.block_size : (i + 1) * self.block_size]
            seq.block_names.append(BlockName(self.compute_hash(token_ids, parent_hash), parent_hash, token_ids))
        return seq.block_names[index]

    def _find_cached(self, seq: Sequence) -> list[int]:
        """The blocks that hold the longest cached prefix, short of the last token: its logits must be computed."""
        cached: list[int] = []
        if seq.wants_prompt_logprobs:
            return cached
        for index in range((seq.num_tokens - 1) // self.block_size):
            name = self._block_name(seq, index)
            block_id = self.hash_to_block_id.get(name.hash)
            if block_id is None or self.blocks[block_id].name != name:
                break
            cached.append(block_id)
        return cached

    def _take_free(self) -> int:
        """Hands out the least recently used free block, whose contents are lost."""
        block_id, _ = self.free_block_ids.popitem(last=False)
        evicted = self.blocks[block_id].name
        if evicted is not None:
            del self.hash_to_block_id[evicted.hash]
        self.blocks[block_id] = Block(ref_count=1)
        return block_id
