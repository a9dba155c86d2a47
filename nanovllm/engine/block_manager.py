"""Bookkeeping of the paged KV cache: which block holds which tokens of whom, and prefix caching.

Paging follows PagedAttention (arXiv 2309.06180). A full block is named by the hash of its parent block's hash and its
own tokens, so that one name stands for a whole prefix; xxhash finds a name, parent and tokens confirm it. A freed
block keeps its contents and its name until it is handed out again, the least recently used first. Every operation
takes O(1) a block. The device's memory is not touched here.
"""

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

import xxhash

from nanovllm.engine.sequence import Sequence


@dataclass(slots=True)
class Block:
    """A block's references and, while it is named, what names it."""

    ref_count: int = 0
    hash: int | None = None
    parent_hash: int | None = None
    token_ids: list[int] | None = None


class BlockManager:
    """Hands out the blocks of the KV cache."""

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.blocks = [Block() for _ in range(num_blocks)]
        self.hash_to_block_id: dict[int, int] = {}
        # Ordered by time of release: the first is the least recently used.
        self.free_block_ids: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))

    @staticmethod
    def compute_hash(token_ids: list[int], parent_hash: int | None = None) -> int:
        """The 64-bit name of a block with these tokens behind a prefix named `parent_hash` (None: no prefix)."""
        hasher = xxhash.xxh64(array("q", token_ids).tobytes())
        if parent_hash is not None:
            hasher.update(parent_hash.to_bytes(8, "little"))
        return hasher.intdigest()

    def can_allocate(self, seq: Sequence) -> bool:
        """Whether there are blocks for all of a waiting sequence's tokens."""
        return self._num_free_needed(seq, self._find_cached(seq)) <= len(self.free_block_ids)

    def allocate(self, seq: Sequence) -> None:
        """Gives a waiting sequence blocks for all of its tokens, cached ones for as much of its prefix as there are.

        Raises:
            RuntimeError: too few blocks are free; nothing has changed then.
        """
        cached = self._find_cached(seq)
        if self._num_free_needed(seq, cached) > len(self.free_block_ids):
            raise RuntimeError(f"{seq} does not fit into the {len(self.free_block_ids)} free blocks")
        # The cached ones first: taking fresh ones could evict them.
        for block_id in cached:
            self.free_block_ids.pop(block_id, None)
            self.blocks[block_id].ref_count += 1
        num_fresh = self._num_blocks(seq) - len(cached)
        seq.block_table = cached + [self._take_free() for _ in range(num_fresh)]
        seq.num_computed_tokens = len(cached) * self.block_size
        if seq.num_cached_tokens < 0:
            seq.num_cached_tokens = seq.num_computed_tokens

    def can_append(self, seq: Sequence) -> bool:
        """Whether a running sequence has, or can get, the block of its last token."""
        return len(seq.block_table) >= self._num_blocks(seq) or bool(self.free_block_ids)

    def may_append(self, seq: Sequence) -> bool:
        """Gives a running sequence one more block if its last token opens one; returns whether it did."""
        if len(seq.block_table) >= self._num_blocks(seq):
            return False
        seq.block_table.append(self._take_free())
        return True

    def deallocate(self, seq: Sequence) -> None:
        """Takes a sequence's blocks back. Named ones can still be hit, its tail being evicted before its head."""
        for block_id in reversed(seq.block_table):
            block = self.blocks[block_id]
            block.ref_count -= 1
            if block.ref_count == 0:
                self.free_block_ids[block_id] = None
        seq.block_table = []
        seq.num_computed_tokens = 0

    def name_blocks(self, seq: Sequence, start: int, end: int) -> None:
        """Names the blocks that became full when tokens [start, end) were computed, so that others can hit them."""
        if not self.enable_prefix_caching:
            return
        for index in range(start // self.block_size, end // self.block_size):
            block_hash = self._block_hash(seq, index)
            block_id = seq.block_table[index]
            block = self.blocks[block_id]
            if block.hash is None and block_hash not in self.hash_to_block_id:
                block.hash = block_hash
                block.parent_hash = seq.block_hashes[index - 1] if index else None
                block.token_ids = self._block_tokens(seq, index)
                self.hash_to_block_id[block_hash] = block_id

    def reset_prefix_cache(self) -> None:
        """Forgets all names; blocks in use stay with their sequences."""
        for block_id in list(self.hash_to_block_id.values()):
            self._forget(self.blocks[block_id])

    def check_integrity(self, block_tables: Iterable[list[int]]) -> None:
        """Raises RuntimeError unless free + cached + in use blocks are all, with the references of these tables."""
        references = Counter(block_id for table in block_tables for block_id in table)
        for block_id, block in enumerate(self.blocks):
            if block.ref_count != references[block_id]:
                raise RuntimeError(f"block {block_id} counts {block.ref_count} of {references[block_id]} references")
            if (block.ref_count == 0) != (block_id in self.free_block_ids):
                raise RuntimeError(f"block {block_id} with {block.ref_count} references is in the wrong place")
        named = {block_id for block_id, block in enumerate(self.blocks) if block.hash is not None}
        if named != set(self.hash_to_block_id.values()):
            raise RuntimeError("the prefix cache's names and blocks do not match")

    def _num_blocks(self, seq: Sequence) -> int:
        return -(-seq.num_tokens // self.block_size)

    def _num_free_needed(self, seq: Sequence, cached: list[int]) -> int:
        in_use = sum(self.blocks[block_id].ref_count > 0 for block_id in cached)
        return self._num_blocks(seq) - in_use

    def _block_tokens(self, seq: Sequence, index: int) -> list[int]:
        return seq.token_ids[index * self.block_size : (index + 1) * self.block_size]

    def _block_hash(self, seq: Sequence, index: int) -> int:
        for i in range(len(seq.block_hashes), index + 1):
            parent_hash = seq.block_hashes[i - 1] if i else None
            seq.block_hashes.append(self.compute_hash(self._block_tokens(seq, i), parent_hash))
        return seq.block_hashes[index]

    def _find_cached(self, seq: Sequence) -> list[int]:
        """The blocks that hold the longest cached prefix, short of the last token: its logits must be computed."""
        cached: list[int] = []
        if not self.enable_prefix_caching:
            return cached
        for index in range((seq.num_tokens - 1) // self.block_size):
            block_id = self.hash_to_block_id.get(self._block_hash(seq, index))
            if block_id is None:
                break
            block = self.blocks[block_id]
            parent_hash = seq.block_hashes[index - 1] if index else None
            if block.parent_hash != parent_hash or block.token_ids != self._block_tokens(seq, index):
                break
            cached.append(block_id)
        return cached

    def _take_free(self) -> int:
        block_id, _ = self.free_block_ids.popitem(last=False)
        block = self.blocks[block_id]
        self._forget(block)
        block.ref_count = 1
        return block_id

    def _forget(self, block: Block) -> None:
        if block.hash is not None:
            del self.hash_to_block_id[block.hash]
            block.hash = block.parent_hash = block.token_ids = None
