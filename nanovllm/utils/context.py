"""The tensors of a step: its tokens, and what attention must know of them."""

from typing import NamedTuple

import torch


class Context(NamedTuple):
    """Attention metadata of one step over S sequences and N tokens.

    The first `num_decodes` sequences compute one token each, their newest; tokens are laid out sequence by sequence.

    Attributes:
        slot_mapping: [N] int32, where a token's KV is stored: block * block_size + offset, -1 for nowhere.
        context_lens: [S] int32, tokens in the cache once this step's are stored; 0 for a padding row.
        block_tables: [S, max_blocks] int32, arbitrary behind a sequence's last block.
        cu_seqlens_q: [S + 1] int32, where each sequence's tokens begin among the N.
        cu_seqlens_k: [S + 1] int32, the running sum of the context lengths.
        max_seqlen_q: an upper bound of the tokens that one sequence computes.
        logits_indices: int64, the tokens whose hidden states are asked for; None: all.
        decode_groups: by window, how the torch backend groups the decodes; empty until a layer has worked it out.
        queries_per_row: how many sequences of a step that only decodes stand for one row of the device's, one behind
            the other, each with one token more in its context: more than one if drafts are checked. They see each
            other's new keys.
    """

    slot_mapping: torch.Tensor
    context_lens: torch.Tensor
    block_tables: torch.Tensor
    num_decodes: int
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    max_seqlen_q: int
    logits_indices: torch.Tensor | None
    decode_groups: dict[int | None, list]
    queries_per_row: int = 1


class StepTensors(NamedTuple):
    """What the model and the sampler read of a step, of N tokens in S sequences.

    Attributes:
        input_ids: [N] int64.
        positions: [N] int32.
        context: what attention must know of them.
        rows: [S] int64, the row of each sequence.
        sample_rows: int64, the rows that get the sampled tokens: [S], or [S / queries_per_row] if drafts are checked.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    context: Context
    rows: torch.Tensor
    sample_rows: torch.Tensor
