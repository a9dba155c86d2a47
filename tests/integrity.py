"""Nothing is lost: free + cached + in use blocks are all, reference counts equal the block tables, rows likewise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.scheduler import Scheduler


def check_blocks(manager: BlockManager, block_tables: Iterable[list[int]]) -> None:
    """Raises RuntimeError unless each block is free or in use, with these tables' references, and names match."""
    references = Counter(block_id for table in block_tables for block_id in table)
    for block_id, block in enumerate(manager.blocks):
        found, is_free = references[block_id], block_id in manager.free_block_ids
        if block.ref_count != found or is_free != (found == 0):
            raise RuntimeError(f"block {block_id} counts {block.ref_count} of {found} references, {is_free=}")
    if len(manager.free_block_ids) + sum(count > 0 for count in references.values()) != len(manager.blocks):
        raise RuntimeError("there are more free blocks than blocks")
    named = {block.name.hash: block_id for block_id, block in enumerate(manager.blocks) if block.name is not None}
    if named != manager.hash_to_block_id:
        raise RuntimeError("the prefix cache's names and blocks do not match")


def check_integrity(scheduler: Scheduler) -> None:
    """Raises RuntimeError where blocks or rows were lost or doubled, or a waiting sequence holds some."""
    check_blocks(scheduler.block_manager, [seq.block_table for seq in scheduler.running])
    rows = sorted(scheduler.free_rows + [seq.row for seq in scheduler.running])
    if rows != list(range(scheduler.config.max_num_seqs)):
        raise RuntimeError("free rows and the running sequences' rows are not all rows")
    if any(seq.block_table or seq.row != -1 for seq in scheduler.waiting):
        raise RuntimeError("a waiting sequence holds blocks or a row")
