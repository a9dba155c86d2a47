# ruff: noqa: ANN001, ANN201, ANN202 (Triton types the arguments of its kernels itself)
"""Attention of one tile of queries over the pages of their sequence: what both kernels of paged attention loop over.

This file knows nothing of how queries and keys are shared out among programs.
"""

from nanovllm.kernels import INTERPRETED, tl, triton

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def _unpack(pairs, dtype: tl.constexpr):
    """Two FP8 numbers in each int16 -> the low ones and the high ones, in float16 or float32."""
    if _INTERPRETED:
        low = pairs.to(tl.int8).to(tl.float8e4nv, bitcast=True).to(dtype)
        high = (pairs >> 8).to(tl.int8).to(tl.float8e4nv, bitcast=True).to(dtype)
    else:  # three instructions for two pairs; of the same in Triton the compiler makes ten
        low, high = tl.inline_asm_elementwise(
            """{
            .reg .b32 bytes;
            .reg .b16 lows, highs;
            prmt.b32 bytes, $2, 0, 0x3120;
            mov.b32 {lows, highs}, bytes;
            cvt.rn.f16x2.e4m3x2 $0, lows;
            cvt.rn.f16x2.e4m3x2 $1, highs;
            }""",
            "=r,=r,r",
            [pairs],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    return low.to(dtype), high.to(dtype)


@triton.jit
def attend_pages(
    q,
    k_ptr,
    v_ptr,
    table_ptr,
    borders,
    oldest,
    first_key,
    last_key,
    scale,
    v_scale,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Attention of the rows of q, [BLOCK_M, DIM padded], over one head's keys, from the first border to the last.

    By online softmax (Milakov & Gimelshein, 2018), in base 2: `scale` and SOFT_CAP (0: none) include log2(e). k_ptr
    and v_ptr point to the head in the caches, table_ptr to the sequence's block table.

    `borders` cut the keys into one to three spans, (begin, end), (begin, tail, end) or (begin, middle, tail, end).
    A span begins at a multiple of BLOCK_N, or is empty. All rows see all of the span before the tail; in other spans
    a row sees the keys up to its last_key, with a WINDOW (0: none) from its first_key on; both are [BLOCK_M, 1], or
    one for all rows. What stands before `oldest` no row sees, nor is it read: its page may be another sequence's.

    The caches have q's dtype, and v_scale is None; or they are FP8, `scale` includes that of the keys, and v_scale is
    that of the values. FP8 is multiplied as float16, in which it is exact, or as float32 if q is that: for two numbers
    it takes one instruction, to bfloat16 four. Values are read in pairs of dimensions, even and odd ones are summed
    apart: matrices of 16 bits a number come transposed from shared memory, bytes would come one by one.

    Returns o, float32 like q, and the log-sum-exp in base 2, float32 [BLOCK_M], -inf for a row that saw no key.
    """
    ROW: tl.constexpr = KV_HEADS * DIM
    SPANS: tl.constexpr = len(borders) - 1
    dims = tl.arange(0, q.shape[1])[None, :]
    if v_scale is None:
        acc = tl.zeros(q.shape, tl.float32)
    else:
        acc = tl.zeros((q.shape[0], q.shape[1] // 2), tl.float32)
        acc_odd = tl.zeros((q.shape[0], q.shape[1] // 2), tl.float32)
        v_pair_ptr = v_ptr.to(tl.pointer_type(tl.int16))
        pairs = tl.arange(0, q.shape[1] // 2)[None, :]
    high = tl.full((q.shape[0],), float("-inf"), tl.float32)
    total = tl.zeros((q.shape[0],), tl.float32)
    if v_scale is not None and q.dtype == tl.bfloat16:
        # Divided by the power of two that its largest number has, any query is exact in float16, but for numbers 2^-14
        # of that and smaller, which are as good as nothing beside it.
        largest = tl.maximum(tl.max(tl.max(tl.abs(q), 1), 0).to(tl.float32), 1e-30)
        power = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        q = (q.to(tl.float32) / power).to(tl.float16)
        scale *= power
    if SOFT_CAP > 0:  # tanh(score * scale / cap) takes the place of a score, the cap that of `scale`
        twice_tanh_scale = 2.0 * scale / SOFT_CAP
        scale = SOFT_CAP
    for SPAN in tl.static_range(SPANS):
        stop = borders[SPAN + 1]
        for n in tl.range(borders[SPAN], stop, BLOCK_N, num_stages=STAGES):
            positions = n + tl.arange(0, BLOCK_N)
            if BLOCK_SIZE >= BLOCK_N:  # the tile lies within one page
                page = tl.load(table_ptr + n // BLOCK_SIZE)
            else:
                page = tl.load(table_ptr + positions // BLOCK_SIZE, mask=positions < stop, other=0)[:, None]
            page = page.to(tl.int64) * (BLOCK_SIZE * ROW)
            offs = (positions % BLOCK_SIZE * ROW)[:, None] + dims
            mask = (positions < stop)[:, None] & (dims < DIM)
            if WINDOW and SPAN == 0:
                mask &= (positions >= oldest)[:, None]
            k = tl.load(k_ptr + page + offs, mask=mask, other=0.0)
            if v_scale is None:
                v = tl.load(v_ptr + page + offs, mask=mask, other=0.0)
            else:
                k = k.to(q.dtype)
                pair_offs = (positions % BLOCK_SIZE * (ROW // 2))[:, None] + pairs
                pair_mask = (positions < stop)[:, None] & (pairs < DIM // 2)
                if WINDOW and SPAN == 0:
                    pair_mask &= (positions >= oldest)[:, None]
                v_pairs = tl.load(v_pair_ptr + page // 2 + pair_offs, mask=pair_mask, other=0)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee")
            if SOFT_CAP > 0:  # tanh(x) = 1 - 2 / (exp(2 x) + 1), which is right even where exp is infinite or 0
                scores = 1.0 - 2.0 / (tl.exp(scores * twice_tanh_scale) + 1.0)
            if SPAN != SPANS - 2:
                keys = n + tl.arange(0, BLOCK_N)[None, :]
                visible = keys <= last_key
                if WINDOW:
                    visible &= keys >= first_key
                scores = tl.where(visible, scores, float("-inf"))
            new_high = tl.maximum(high, tl.max(scores, 1) * scale)
            shift = new_high
            if WINDOW:  # so far a row may have seen no key: -inf less -inf would be NaN
                shift = tl.where(new_high == float("-inf"), 0.0, new_high)
            p = tl.exp2(scores * scale - shift[:, None])
            alpha = tl.exp2(high - shift)
            if v_scale is None:
                acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
            else:
                v_even, v_odd = _unpack(v_pairs, q.dtype)
                acc = tl.dot(p.to(q.dtype), v_even, acc * alpha[:, None], input_precision="ieee")
                acc_odd = tl.dot(p.to(q.dtype), v_odd, acc_odd * alpha[:, None], input_precision="ieee")
            total = total * alpha + tl.sum(p, 1)
            high = new_high
    if v_scale is not None:
        acc = tl.join(acc, acc_odd).reshape(q.shape[0], q.shape[1]) * v_scale
    return acc / tl.where(total == 0.0, 1.0, total)[:, None], high + tl.log2(total)
