# ruff: noqa: ANN001, ANN202 (Triton types the arguments of its kernels itself)
"""Products of few tokens with a mixture of experts: a program multiplies one row, or the pairs of one token.

With weights in 8 bits, instructions take as long as reading does: what is done for each code is counted.
"""

from torch import Tensor

from nanovllm.kernels import pdl_options, pdl_wait, tl, triton
from nanovllm.kernels.quantized_weight import QuantizedWeight
from nanovllm.kernels.routing import Routing
from nanovllm.kernels.tuning import few_experts_tile, few_quantized_experts_tile

MOST_AHEAD = tl.constexpr(4)  # steps of K whose codes are on their way at once
LOG_RUN = tl.constexpr(4)
RUN = tl.constexpr(1 << 4)  # codes that a thread reads at once


@triton.jit
def _sum_of_products(x, w):
    """The sum over the last axis, of RUN elements, of x * w, float32 [P, N, RUNS, RUN].

    A product and an addition are one instruction here, as they are not in `tl.sum`, for which products come first.
    """
    P: tl.constexpr = w.shape[0]
    N: tl.constexpr = w.shape[1]
    RUNS: tl.constexpr = w.shape[2]
    xs, ws = (x,), (w,)
    for halving in tl.static_range(1, LOG_RUN + 1):
        x_halves, w_halves = (), ()
        for i in tl.static_range(len(xs)):
            x0, x1 = tl.split(tl.reshape(xs[i], (P, N, RUNS, RUN >> halving, 2)))
            w0, w1 = tl.split(tl.reshape(ws[i], (P, N, RUNS, RUN >> halving, 2)))
            x_halves = x_halves + (x0, x1)  # noqa: RUF005 (Triton has no such syntax)
            w_halves = w_halves + (w0, w1)  # noqa: RUF005
        xs, ws = x_halves, w_halves
    total = xs[0] * ws[0]
    for i in tl.static_range(1, RUN):
        total += xs[i] * ws[i]
    return tl.reshape(total, (P, N, RUNS))


@triton.jit
def _few_codes_products(
    x_ptr,
    codes_ptr,
    scales_ptr,
    norm_ptr,
    mask_s,
    mask_w,
    first,
    K: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Parts of rows x_ptr [P, B] times codes codes_ptr [P, N, B], STEP by STEP over K -> float32 [P, N].

    scales_ptr: [P, N], the first scale of each feature. first: [P], the first columns of the parts. Also, with a norm,
    the sums of x's squares, float32 [P]. The codes of up to MOST_AHEAD steps are on their way at once.
    """
    P: tl.constexpr = codes_ptr.shape[0]
    BLOCK_N: tl.constexpr = codes_ptr.shape[1]
    BLOCK_K: tl.constexpr = codes_ptr.shape[2]
    RUNS: tl.constexpr = BLOCK_K // RUN
    AHEAD: tl.constexpr = min(MOST_AHEAD, triton.cdiv(K, STEP))
    k = first[:, None] + tl.arange(0, BLOCK_K)[None, :]
    squares = tl.zeros((P, BLOCK_K), tl.float32)
    acc = tl.zeros((P, BLOCK_N, RUNS), tl.float32)  # each a thread's own; threads' sums are added up once, at the end
    for start in tl.range(0, K, AHEAD * STEP, num_stages=1):
        codes, xs = (), ()
        for step in tl.static_range(AHEAD):
            left = k < K - start - step * STEP
            part = tl.load(codes_ptr + start + step * STEP, mask=mask_w & left[:, None, :], other=0.0)
            codes = codes + (part,)  # noqa: RUF005
        for step in tl.static_range(AHEAD):
            left = k < K - start - step * STEP
            x = tl.load(x_ptr + start + step * STEP, mask=mask_s[:, None] & left, other=0.0)
            if norm_ptr is not None:
                h = x.to(tl.float32)
                squares += h * h
                norm = tl.load(norm_ptr + start + step * STEP + k, mask=left, other=0.0)
                h *= norm.to(tl.float32)
                x = h if x.dtype == tl.float16 else h.to(x.dtype)  # which may not hold it yet
            xs = xs + (x,)  # noqa: RUF005
        for step in tl.static_range(AHEAD):
            # Spread over the features first, so that it is brought to the threads as a whole, not in RUN pieces.
            x = tl.broadcast_to(xs[step].to(tl.float32)[:, None, :], (P, BLOCK_N, BLOCK_K))
            numbers = codes[step].to(tl.float32)
            sums = _sum_of_products(
                tl.reshape(x, (P, BLOCK_N, RUNS, RUN)), tl.reshape(numbers, (P, BLOCK_N, RUNS, RUN))
            )
            if SCALE_COLUMNS < K:
                column = start + step * STEP + first[:, None, None] + tl.arange(0, RUNS)[None, None, :] * RUN
                sums *= tl.load(scales_ptr[:, :, None] + column // SCALE_COLUMNS, mask=column < K, other=0.0)
            acc += sums
    y = tl.sum(acc, 2)
    if SCALE_COLUMNS >= K:
        y *= tl.load(scales_ptr)
    return y, tl.sum(squares, 1)


@triton.jit
def _few_kernel(
    x_ptr,
    x_stride,
    weight_ptr,
    scales_ptr,
    experts_ptr,
    weights_ptr,
    norm_ptr,
    eps,
    out_ptr,
    out_stride,
    N: tl.constexpr,
    K: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr,
    PAIRS_PER_ROW: tl.constexpr,
    SLOTS: tl.constexpr,
    GATED: tl.constexpr,
    ADDED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK_N features of one row of the result, which is the weighted sum over SLOTS pairs.

    Axis 0 of the tiles are the pairs, times the SPLITS parts of K. (It is long by its arguments.)
    """
    SLOTS_PAD: tl.constexpr = triton.next_power_of_2(SLOTS)
    parts = tl.arange(0, SLOTS_PAD * SPLITS)
    slots = parts // SPLITS
    mask_s = slots < SLOTS
    row = tl.program_id(0).to(tl.int64)
    pairs = row * SLOTS + slots
    features = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = features < N
    if GATED:
        features = features // 2 + features % 2 * (N // 2)
    k = (parts % SPLITS)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    pdl_wait(PDL)
    experts = tl.load(experts_ptr + pairs, mask=mask_s, other=0).to(tl.int64)
    w_ptr = weight_ptr + (experts[:, None] * N + features[None, :])[:, :, None] * K + k[:, None, :]
    x_ptr += (pairs // PAIRS_PER_ROW)[:, None] * x_stride + k
    mask_w = mask_s[:, None, None] & mask_n[None, :, None]
    if scales_ptr is None:
        acc = tl.zeros((SLOTS_PAD * SPLITS, BLOCK_N), tl.float32)
        squares = tl.zeros((SLOTS_PAD * SPLITS,), tl.float32)
        for start in tl.static_range(0, K, SPLITS * BLOCK_K):
            left = k < K - start
            w = tl.load(w_ptr + start, mask=mask_w & left[:, None, :], other=0.0).to(tl.float32)
            x = tl.load(x_ptr + start, mask=mask_s[:, None] & left, other=0.0).to(tl.float32)
            if norm_ptr is not None:
                squares += tl.sum(x * x, 1)
                x *= tl.load(norm_ptr + start + k, mask=left, other=0.0).to(tl.float32)
            acc += tl.sum(x[:, None, :] * w, 2)
    else:
        first = parts % SPLITS * BLOCK_K
        safe_features = tl.where(mask_n, features, 0)
        scale_rows = experts[:, None] * tl.cdiv(N, SCALE_ROWS) + safe_features[None, :] // SCALE_ROWS
        scales_ptr += scale_rows * tl.cdiv(K, SCALE_COLUMNS)
        acc, squares = _few_codes_products(
            x_ptr, w_ptr, scales_ptr, norm_ptr, mask_s, mask_w, first, K, SCALE_COLUMNS, SPLITS * BLOCK_K
        )
    if weights_ptr is not None:
        acc *= tl.load(weights_ptr + pairs, mask=mask_s, other=0.0)[:, None]
    y = tl.sum(acc, 0)
    if norm_ptr is not None:
        y *= tl.rsqrt(tl.sum(squares, 0) / K + eps)
    SHARE: tl.constexpr = 2 if GATED else 1
    if GATED:
        gate, up = tl.split(tl.reshape(y, (BLOCK_N // 2, 2)))
        y = gate / (1.0 + tl.exp(-gate)) * up
    n = tl.program_id(1) * (BLOCK_N // SHARE) + tl.arange(0, BLOCK_N // SHARE)
    mask = n < N // SHARE
    out_ptr += row * out_stride + n
    if ADDED:
        y += tl.load(out_ptr, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr, y.to(out_ptr.dtype.element_ty), mask=mask)


def numbers_of(weight: Tensor | QuantizedWeight) -> tuple[Tensor, Tensor | None, tuple[int, int]]:
    """A plain weight without scales, or codes, their scales, and the rows and columns that have one."""
    if isinstance(weight, Tensor):
        return weight, None, (1, weight.size(2))
    return weight.codes, weight.scales, weight.block


def launch_few(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    routing: Routing,
    out: Tensor,
    norm: Tensor | None,
    eps: float,
    slots: int,
    is_gated: bool,
    is_added: bool,
) -> None:
    """Each of out's rows is the sum over `slots` pairs of a row of x times their expert's weight.

    Of gates and ups (slots 1) pair p has row p // top_k of x, and `out` is silu(gate) * up; the norm is as for
    `gate_up_experts`. Of downs, pair p has row p, and counts by its weight of the routing. is_added: out has numbers
    already, which the sums are added to.
    """
    _num_experts, num_features, size = weight.shape
    num_pairs, top_k = routing.experts.numel(), routing.experts.size(1)
    numbers, scales, (scale_rows, scale_columns) = numbers_of(weight)
    tile = few_experts_tile(size, slots) if scales is None else few_quantized_experts_tile(slots)
    _few_kernel[num_pairs // slots, triton.cdiv(num_features, tile.block_n)](
        x,
        x.stride(0),
        numbers,
        scales,
        routing.experts,
        None if is_gated else routing.weights,
        norm,
        eps,
        out,
        out.stride(0),
        N=num_features,
        K=size,
        SCALE_ROWS=scale_rows,
        SCALE_COLUMNS=scale_columns,
        PAIRS_PER_ROW=top_k if is_gated else 1,
        SLOTS=slots,
        GATED=is_gated,
        ADDED=is_added,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        SPLITS=tile.splits,
        num_warps=tile.warps,
        **pdl_options(x.device),
    )
