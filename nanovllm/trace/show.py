"""A recorded run in words: of each step its sequences, their block tables and slots, what goes in, what comes out."""

from collections.abc import Callable, Iterator
from typing import Any


def show_run(run: dict[str, Any], decode: Callable[[list[int]], str]) -> Iterator[str]:
    """The lines that tell a run; `decode` makes text of token ids."""
    block_size = run["engine"]["block_size"]
    texts = {int(seq_id): list(seq["prompt_token_ids"]) for seq_id, seq in run["sequences"].items()}
    for seq_id, tokens in texts.items():
        yield f"sequence {seq_id}: a prompt of {len(tokens)} tokens {tokens}"
    # What a step computes may be known only when the step before it, which is told later, was seen.
    for step in run["steps"]:
        for seq_id, tokens in step.get("tokens", []):
            texts[seq_id] += tokens
    tables: dict[int, list[int]] = {}
    for number, step in enumerate(run["steps"]):
        yield _headline(number, step, run["engine"]["num_blocks"])
        for seq_id in step["preempted"]:
            yield f"  sequence {seq_id} is preempted: it loses its blocks {tables[seq_id]}"
        for seq_id in step["joined"]:
            tables[seq_id] = []
        for seq_id, _, block in step["new_blocks"]:
            tables[seq_id].append(block)
        sampled = dict(step.get("tokens", []))
        for seq_id, start, num_tokens, is_sampled in step["parts"]:
            end = start + num_tokens
            yield f"  sequence {seq_id} {_kind(step, seq_id, start, num_tokens, is_sampled)}"
            yield f"    block table {tables[seq_id]}"
            slots = slots_of(tables[seq_id], start, end, block_size)
            yield f"    positions {ranges(range(start, end))} -> slots {ranges(slots)}"
            yield f"    in  {decode(texts[seq_id][start:end])!r}"
            if not is_sampled:
                yield "    out nothing: the prompt goes on"
            elif seq_id not in sampled:
                yield "    out nothing: the sequence had ended when this was seen"
            else:
                yield f"    out {decode(sampled[seq_id])!r} {sampled[seq_id]}"
        for seq_id in step.get("finished", []):
            yield f"  sequence {seq_id} ends: {run['sequences'][str(seq_id)]['finish_reason']}"


def slots_of(block_table: list[int], start: int, end: int, block_size: int) -> list[int]:
    """Where the keys and values of positions [start, end) are stored: block * block_size + offset."""
    return [block_table[i // block_size] * block_size + i % block_size for i in range(start, end)]


def ranges(numbers: list[int] | range) -> str:
    """Ascending runs of numbers, such as 0-15, 32-40; "" of none."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _headline(number: int, step: dict[str, Any], num_blocks: int) -> str:
    num_tokens = sum(part[2] for part in step["parts"])
    return (
        f"\nstep {number}: sequences {len(step['parts'])}, tokens {num_tokens}, waiting {step['num_waiting']}, "
        f"blocks {step['blocks_in_use']} of {num_blocks}"
    )


def _kind(step: dict[str, Any], seq_id: int, start: int, num_tokens: int, is_sampled: bool) -> str:
    """What a sequence's part of a step is, in words."""
    if seq_id in step["joined"]:
        cached = f", {start} more are cached" if start else ""
        return f"joins: {num_tokens} tokens{cached}"
    if num_tokens == 1 and is_sampled:
        return "decodes"
    return f"goes on with its prompt: {num_tokens} tokens"
