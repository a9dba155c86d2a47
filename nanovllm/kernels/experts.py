# ruff: noqa: ANN001, ANN202 (Triton types the arguments of its kernels itself)
"""Products with a mixture of experts: each row with the weights of the experts that it was routed to.

A pair is a token and one of its experts; pair p belongs to token p // top_k. The gate and up projections give a row
for each pair; the down projection's rows are weighted and added up for each token. Few tokens meet few experts, mostly
a row each: see few_experts.py. Many tokens are sorted by expert, so that an expert's weights are read once for a tile
of rows (after MegaBlocks, arXiv 2211.15841). How many rows an expert gets is known on the device alone, so that all of
it can be in a CUDA graph.

Weights may be in 8 bits (e4m3) with scales. Rows of many tokens are then rounded too, so that tensor cores multiply
codes; those of few tokens stay as they are.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm.kernels import pdl_options, pdl_wait, tl, triton, use_triton
from nanovllm.kernels.activation import silu_and_mul_torch
from nanovllm.kernels.e4m3 import E4M3
from nanovllm.kernels.few_experts import launch_few, numbers_of
from nanovllm.kernels.quantized_weight import QuantizedWeight
from nanovllm.kernels.rms_norm import rms_norm_torch
from nanovllm.kernels.round_rows import round_rows
from nanovllm.kernels.routing import Routing
from nanovllm.kernels.tuning import experts_tile, quantized_experts_tile

COMBINE_BLOCK = 1024


@triton.jit(do_not_specialize=["num_tokens", "x_rows"])
def _grouped_kernel(
    x_ptr,
    x_scales_ptr,
    weight_ptr,
    scales_ptr,
    order_ptr,
    counts_ptr,
    y_ptr,
    num_tokens,
    x_rows,
    N: tl.constexpr,
    K: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr,
    EXPERTS: tl.constexpr,
    PAIRS_PER_ROW: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK_N features of up to BLOCK_M of an expert's rows; row p // PAIRS_PER_ROW of x is that of pair p.

    With scales, x and the weight are codes; x_scales_ptr: [scales of a row, x_rows]. Features come first in their
    product: tensor cores want 64 rows of a tile, and an expert may have few.
    """
    pdl_wait(PDL)
    tile = tl.program_id(0)
    experts = tl.arange(0, triton.next_power_of_2(EXPERTS))
    counts = tl.load(counts_ptr + experts, mask=experts < EXPERTS, other=0)
    ends = tl.cumsum(tl.cdiv(counts, BLOCK_M), 0)  # of the experts' tiles
    expert = tl.sum((ends <= tile).to(tl.int32), 0)
    if expert >= EXPERTS:  # there are fewer tiles than there might have been
        return
    count = tl.sum(tl.where(experts == expert, counts, 0), 0)
    first_tile = tl.max(tl.where(experts < expert, ends, 0), 0)
    m = (tile - first_tile) * BLOCK_M + tl.arange(0, BLOCK_M)
    pairs = tl.load(order_ptr + expert * num_tokens + m, mask=m < count, other=0).to(tl.int64)
    features = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = features < N
    if GATED:  # a gate beside its up
        features = features // 2 + features % 2 * (N // 2)
    k = tl.arange(0, BLOCK_K)[None, :]
    rows = pairs // PAIRS_PER_ROW
    x_ptr += rows[:, None] * K + k
    weight_ptr += (expert.to(tl.int64) * N + features)[:, None] * K + k
    mask_m = (m < count)[:, None]
    if scales_ptr is not None:
        scales_ptr += (expert * tl.cdiv(N, SCALE_ROWS) + features // SCALE_ROWS) * tl.cdiv(K, SCALE_COLUMNS)
    acc = tl.zeros((BLOCK_M, BLOCK_N) if scales_ptr is None else (BLOCK_N, BLOCK_M), tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        left = k < K - start
        x = tl.load(x_ptr + start, mask=mask_m & left, other=0.0)
        w = tl.load(weight_ptr + start, mask=mask_n[:, None] & left, other=0.0)
        if scales_ptr is None:
            acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
        elif SCALE_COLUMNS < K:
            column = start // SCALE_COLUMNS
            scales = tl.load(scales_ptr + column, mask=mask_n, other=0.0)[:, None]
            acc += tl.dot(w, tl.trans(x)) * (scales * tl.load(x_scales_ptr + column * x_rows + rows)[None, :])
        else:
            acc = tl.dot(w, tl.trans(x), acc)
    if scales_ptr is not None:
        if SCALE_COLUMNS >= K:
            acc *= tl.load(scales_ptr, mask=mask_n, other=0.0)[:, None] * tl.load(x_scales_ptr + rows)[None, :]
        acc = tl.trans(acc)
    SHARE: tl.constexpr = 2 if GATED else 1
    if GATED:
        gate, up = tl.split(tl.reshape(acc, (BLOCK_M, BLOCK_N // 2, 2)))
        acc = gate / (1.0 + tl.exp(-gate)) * up
    n = tl.program_id(1) * (BLOCK_N // SHARE) + tl.arange(0, BLOCK_N // SHARE)
    offs = pairs[:, None] * (N // SHARE) + n[None, :]
    tl.store(y_ptr + offs, acc.to(y_ptr.dtype.element_ty), mask=mask_m & (n < N // SHARE)[None, :])


@triton.jit
def _combine_kernel(
    y_ptr,
    weights_ptr,
    counts_ptr,
    out_ptr,
    out_stride,
    N: tl.constexpr,
    TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr,
    ADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK features of one token; the first program zeroes the counts, which nobody needs any more."""
    pdl_wait(PDL)
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = n < N
    out_ptr += token * out_stride + n
    total = tl.zeros((BLOCK,), tl.float32)
    for slot in tl.static_range(TOP_K):
        pair = token * TOP_K + slot
        total += tl.load(weights_ptr + pair) * tl.load(y_ptr + pair * N + n, mask=mask, other=0.0).to(tl.float32)
    if ADDED:
        total += tl.load(out_ptr, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr, total.to(out_ptr.dtype.element_ty), mask=mask)
    if tl.program_id(0) + tl.program_id(1) == 0:
        experts = tl.arange(0, triton.next_power_of_2(EXPERTS))
        tl.store(counts_ptr + experts, tl.zeros_like(experts), mask=experts < EXPERTS)


def gate_up_experts_torch(
    x: Tensor, weight: Tensor | QuantizedWeight, routing: Routing, norm: Tensor | None = None, eps: float = 0.0
) -> Tensor:
    """What `gate_up_experts` computes, said plainly."""
    if norm is not None:
        x = rms_norm_torch(x, norm, eps)
    rows = x.repeat_interleave(routing.experts.size(1), 0)
    h = x.new_empty(len(rows), weight.shape[1] // 2)
    for expert, pairs in _pairs_by_expert(routing):
        h[pairs] = silu_and_mul_torch(F.linear(rows[pairs], _matrix_of(weight, expert, x.dtype)))
    return h


def down_experts_torch(
    h: Tensor, weight: Tensor | QuantizedWeight, routing: Routing, residual: Tensor | None = None
) -> Tensor:
    """What `down_experts` computes, said plainly."""
    rows = h.new_empty(len(h), weight.shape[1])
    for expert, pairs in _pairs_by_expert(routing):
        rows[pairs] = F.linear(h[pairs], _matrix_of(weight, expert, h.dtype))
    rows = rows.view(*routing.weights.shape, -1).float()
    y = (rows * routing.weights[..., None]).sum(1).to(h.dtype)
    routing.counts.zero_()
    return y if residual is None else residual.add_(y)


def _matrix_of(weight: Tensor | QuantizedWeight, expert: int, dtype: torch.dtype) -> Tensor:
    """The numbers [N, K] of one expert."""
    if isinstance(weight, Tensor):
        return weight[expert]
    return replace(weight, codes=weight.codes[expert], scales=weight.scales[expert]).dequantize(dtype)


def _pairs_by_expert(routing: Routing) -> list[tuple[int, Tensor]]:
    """Of each expert that has any, its pairs, int64."""
    experts = routing.experts.flatten()
    return [(expert, (experts == expert).nonzero().flatten()) for expert in experts.unique().tolist()]


def gate_up_experts(
    x: Tensor, weight: Tensor | QuantizedWeight, routing: Routing, norm: Tensor | None = None, eps: float = 0.0
) -> Tensor:
    """silu(gate) * up of each pair, [T * K, I], pair by pair.

    Args:
        x: [T, H], contiguous.
        weight: [E, 2 I, H], contiguous; of each expert the gates, then the ups. In 8 bits: e4m3, with float32 scales
            of whole rows, or of blocks whose columns are a power of two and 32 at least.
        routing: the experts of the T tokens. For more than FEW_TOKENS, with `order`.
        norm: [H], the weight of an RMSNorm of x's rows, with `eps`; only for up to FEW_TOKENS.
    """
    if not use_triton(x):
        return gate_up_experts_torch(x, weight, routing, norm, eps)
    num_features = weight.shape[1]
    num_tokens, top_k = routing.experts.shape
    h = torch.empty((num_tokens * top_k, num_features // 2), dtype=x.dtype, device=x.device)
    if routing.order is None:
        launch_few(x, weight, routing, h, norm, eps, slots=1, is_gated=True, is_added=False)
    else:
        _launch_grouped(x, weight, routing, h, pairs_per_row=top_k, is_gated=True)
    return h


def down_experts(
    h: Tensor, weight: Tensor | QuantizedWeight, routing: Routing, residual: Tensor | None = None
) -> Tensor:
    """The weighted sums of the experts' down projections, [T, H]; zeroes the routing's counts.

    Args:
        h: [T * K, I], contiguous, pair by pair.
        weight: [E, H, I], contiguous; in 8 bits as for `gate_up_experts`.
        routing: the experts of the T tokens.
        residual: [T, H], rows any distance apart; the sums are added to it in place and it is returned.
    """
    if not use_triton(h):
        return down_experts_torch(h, weight, routing, residual)
    num_experts, num_features, _ = weight.shape
    num_tokens, top_k = routing.experts.shape
    out = residual
    if out is None:
        out = torch.empty((num_tokens, num_features), dtype=h.dtype, device=h.device)
    is_added = residual is not None
    if routing.order is None:
        launch_few(h, weight, routing, out, None, 0.0, slots=top_k, is_gated=False, is_added=is_added)
        return out
    y = torch.empty((num_tokens * top_k, num_features), dtype=h.dtype, device=h.device)
    _launch_grouped(h, weight, routing, y, pairs_per_row=1, is_gated=False)
    _combine_kernel[num_tokens, triton.cdiv(num_features, COMBINE_BLOCK)](
        y,
        routing.weights,
        routing.counts,
        out,
        out.stride(0),
        N=num_features,
        TOP_K=top_k,
        EXPERTS=num_experts,
        ADDED=is_added,
        BLOCK=COMBINE_BLOCK,
        num_warps=4,
        **pdl_options(h.device),
    )
    return out


def _launch_grouped(
    x: Tensor, weight: Tensor | QuantizedWeight, routing: Routing, y: Tensor, pairs_per_row: int, is_gated: bool
) -> None:
    num_experts, num_features, size = weight.shape
    num_tokens, num_pairs = len(routing.experts), routing.experts.numel()
    numbers, scales, (scale_rows, scale_columns) = numbers_of(weight)
    if scales is None:
        x_scales, tile = None, experts_tile(num_pairs / num_experts, x.dtype)
    else:
        x, x_scales = round_rows(x, E4M3, min(scale_columns, size))
        tile = quantized_experts_tile(num_pairs / num_experts, size, scale_columns)
    num_tiles = min(num_experts, num_pairs) + num_pairs // tile.block_m  # at most: each expert's last may be in part
    _grouped_kernel[num_tiles, triton.cdiv(num_features, tile.block_n)](
        x,
        x_scales,
        numbers,
        scales,
        routing.order,
        routing.counts,
        y,
        num_tokens,
        len(x),
        N=num_features,
        K=size,
        SCALE_ROWS=scale_rows,
        SCALE_COLUMNS=scale_columns,
        EXPERTS=num_experts,
        PAIRS_PER_ROW=pairs_per_row,
        GATED=is_gated,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        STAGES=tile.stages,
        num_warps=tile.warps,
        **pdl_options(x.device),
    )
