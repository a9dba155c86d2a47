# ruff: noqa: ANN001, ANN202 (Triton types the arguments of its kernels itself)
"""The logits as the parameters of their requests change them: masks, lists of tokens, biases, penalties.

What a request asks for stands in tables with a row of a whole vocabulary each, and is read anew in every step, by
whatever row the request has: so a CUDA graph may hold it. A row that asks for nothing costs a copy, and what its rows
of the tables hold does not matter. This file knows what the bits of a table mean; not who sets them, nor how a token
is drawn from what it returns.

Both functions take the same steps in the same order, each rounded to float32: they agree bit for bit.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from nanovllm.kernels import tl, triton, use_triton

# What a request's row asks for: bits of its flags.
USES_TABLE = 1  # its row of `LogitTables.tokens`
USES_BIAS = 2  # its row of `LogitTables.bias`
USES_MASK = 4  # its row of `LogitTables.mask`
IS_ALLOW_LIST = 8  # with USES_TABLE: LISTED tokens are the only ones allowed, and not the forbidden ones

# What a row of `LogitTables.tokens` says of a token: bits, and from bit COUNT_SHIFT on a number.
IN_PROMPT = 1
ENDS_TEXT = 2  # not before the request's min_length
LISTED = 4
COUNT_SHIFT = 3  # how often it was generated

BLOCK = 4096  # logits of one program
NUM_WARPS = 8


class LogitTables(NamedTuple):
    """A row for every row of the batch that a request may have, R in all; contiguous."""

    tokens: Tensor  # int32 [R, V], see the bits above
    bias: Tensor | None = None  # float32 [R, V], added to the logits; None: no flags hold USES_BIAS
    mask: Tensor | None = None  # int32 [R, ceil(V / 32)]: bit t % 32 of word t // 32 allows token t; None: as above


@triton.jit
def _adjust_kernel(
    logits_ptr,
    stride,
    rows_ptr,
    positions_ptr,
    row_ints_ptr,
    row_floats_ptr,
    tokens_ptr,
    bias_ptr,
    mask_ptr,
    out_ptr,
    num_rows,
    size,
    BLOCK: tl.constexpr,
    USES_TABLE: tl.constexpr = USES_TABLE,
    USES_BIAS: tl.constexpr = USES_BIAS,
    USES_MASK: tl.constexpr = USES_MASK,
    IS_ALLOW_LIST: tl.constexpr = IS_ALLOW_LIST,
    IN_PROMPT: tl.constexpr = IN_PROMPT,
    ENDS_TEXT: tl.constexpr = ENDS_TEXT,
    LISTED: tl.constexpr = LISTED,
    COUNT_SHIFT: tl.constexpr = COUNT_SHIFT,
):
    """Arguments of `adjust_logits`; a program has BLOCK logits of a row."""
    row = tl.program_id(0).to(tl.int64)
    ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_inside = ids < size
    request = tl.load(rows_ptr + row)
    flags = tl.load(row_ints_ptr + 3 * num_rows + request)
    x = tl.load(logits_ptr + row * stride + ids, mask=is_inside).to(tl.float32)
    out_ptr += row * size + ids
    if flags == 0:
        tl.store(out_ptr, x, mask=is_inside)
        return
    # All loads come first, so that none waits for another. What a row does not use is not read.
    uses_table = (flags & USES_TABLE) != 0
    uses_bias = (flags & USES_BIAS) != 0
    uses_mask = (flags & USES_MASK) != 0
    tokens = tl.load(tokens_ptr + request * size + ids, mask=ids < tl.where(uses_table, size, 0), other=0)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + request * size + ids, mask=ids < tl.where(uses_bias, size, 0), other=0.0)
    if mask_ptr is not None:
        mask_ptr += request * tl.cdiv(size, 32) + ids // 32
        words = tl.load(mask_ptr, mask=ids < tl.where(uses_mask, size, 0), other=-1)
        x = tl.where(((words >> (ids % 32)) & 1) != 0, x, float("-inf"))
    if uses_table:
        x = tl.where(((tokens & LISTED) != 0) == ((flags & IS_ALLOW_LIST) != 0), x, float("-inf"))
    if bias_ptr is not None:
        x = tl.where(uses_bias & (x != float("-inf")), x + bias, x)
    if uses_table:
        is_too_short = tl.load(positions_ptr + row) < tl.load(row_ints_ptr + 2 * num_rows + request)
        x = tl.where(((tokens & ENDS_TEXT) != 0) & is_too_short, float("-inf"), x)
        counts = tokens >> COUNT_SHIFT
        repetition = tl.load(row_floats_ptr + 5 * num_rows + request)
        if repetition != 1.0:  # exact divisions take long
            is_seen = (((tokens & IN_PROMPT) != 0) | (counts > 0)) & (x != float("-inf"))
            x = tl.where(is_seen, tl.where(x > 0, tl.div_rn(x, repetition), x * repetition), x)
        presence = tl.load(row_floats_ptr + 3 * num_rows + request)
        frequency = tl.load(row_floats_ptr + 4 * num_rows + request)
        x = tl.where(counts > 0, x - frequency * counts.to(tl.float32) - presence, x)
    tl.store(out_ptr, x, mask=is_inside)


def adjust_logits_torch(
    logits: Tensor, rows: Tensor, positions: Tensor, row_ints: Tensor, row_floats: Tensor, tables: LogitTables
) -> Tensor:
    """What `adjust_logits` computes, said plainly."""
    _top_k, _seed, min_length, flags = row_ints[:, rows, None]
    _temperature, _top_p, _min_p, presence, frequency, repetition = row_floats[:, rows, None]
    x = logits.float()
    if tables.mask is not None:
        bits = tables.mask[rows, :, None] >> torch.arange(32, dtype=torch.int32, device=logits.device)
        is_allowed = (bits & 1).flatten(1)[:, : x.size(1)] != 0
        x = torch.where((flags & USES_MASK == 0) | is_allowed, x, -torch.inf)
    uses_table = flags & USES_TABLE != 0
    tokens = torch.where(uses_table, tables.tokens[rows], 0)
    is_allowed = (tokens & LISTED != 0) == (flags & IS_ALLOW_LIST != 0)
    x = torch.where(~uses_table | is_allowed, x, -torch.inf)
    if tables.bias is not None:
        # No infinite bias makes NaN of a token that is forbidden.
        x = torch.where((flags & USES_BIAS != 0) & (x != -torch.inf), x + tables.bias[rows], x)
    x = torch.where((tokens & ENDS_TEXT != 0) & (positions[:, None] < min_length), -torch.inf, x)
    counts = tokens >> COUNT_SHIFT
    is_seen = ((tokens & IN_PROMPT != 0) | (counts > 0)) & (x != -torch.inf)
    x = torch.where(is_seen, torch.where(x > 0, x / repetition, x * repetition), x)
    return torch.where(counts > 0, x - frequency * counts - presence, x)


def adjust_logits(
    logits: Tensor, rows: Tensor, positions: Tensor, row_ints: Tensor, row_floats: Tensor, tables: LogitTables
) -> Tensor:
    """The logits, float32 [B, V], of which the tokens are drawn; `logits` stay as they are.

    In this order, for what the flags of a row name: tokens that the mask does not allow become -inf, then those that
    the list forbids; the bias is added; tokens that end the text become -inf while prompt and text are shorter than
    `min_length`; the logits of tokens in the prompt or the text are divided by the repetition penalty if positive and
    multiplied by it if not; and those of tokens in the text lose the frequency penalty as often as they were
    generated, and the presence penalty once. -inf stays -inf; NaN stays NaN where nothing forbids the token.

    Args:
        logits: [B, V] of any float type, the elements of a row side by side.
        rows: int64 [B], where in R rows the logits' requests stand.
        positions: int [B], the length of prompt and text so far.
        row_ints: int64 [4, R]: top_k, seed, min_length (of prompt and text), flags.
        row_floats: float32 [6, R]: temperature, top_p, min_p, penalties of presence, frequency, repetition (positive).
        tables: what the requests ask for, of R rows and V tokens.
    """
    if not use_triton(logits):
        return adjust_logits_torch(logits, rows, positions, row_ints, row_floats, tables)
    batch_size, vocab_size = logits.shape
    out = torch.empty((batch_size, vocab_size), dtype=torch.float32, device=logits.device)
    _adjust_kernel[(batch_size, triton.cdiv(vocab_size, BLOCK))](
        logits,
        logits.stride(0),
        rows,
        positions,
        row_ints,
        row_floats,
        *tables,
        out,
        row_ints.size(1),
        vocab_size,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,  # each step rounds, as torch does
    )
    return out


def count_tokens(tokens: Tensor, rows: Tensor, token_ids: Tensor) -> None:
    """Adds one to how often the tokens were generated, in `LogitTables.tokens`; entries may name a row twice.

    Args:
        tokens: int32 [R, V], contiguous; changed in place.
        rows: int64 [B], the rows of the requests that generated them.
        token_ids: int64 [B]; -1: none.
    """
    is_token = token_ids >= 0
    places = rows * tokens.size(1) + token_ids.clamp(min=0)
    tokens.view(-1).index_add_(0, places, is_token.int() << COUNT_SHIFT)
