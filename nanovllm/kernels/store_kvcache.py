# ruff: noqa: ANN001, ANN202 (Triton types the arguments of its kernels itself)
"""From the fused QKV projection to a rotated query and a KV cache that holds this step's keys and values.

One kernel does per-head RMSNorm (Qwen3), the rotary embedding and the scattered store, so that q, k and v cross the
memory bus once. It knows nothing of sequences: a row has a position and a slot.
"""

import torch
from torch import Tensor

from nanovllm.kernels import pdl_options, pdl_wait, tl, triton, use_triton
from nanovllm.kernels.e4m3 import E4M3, E4M3_MAX
from nanovllm.kernels.rms_norm import rms_norm_torch


@triton.jit
def _load_pairs(x_ptr, HEADS: tl.constexpr, DIM: tl.constexpr, ROTARY_DIM: tl.constexpr):
    """The pairs that the rotation turns of the heads at x_ptr, in float32; the first ones' offsets, and so on.

    Dimension i is paired with i + ROTARY_DIM / 2. The dimensions that do not rotate are paired likewise among
    themselves, behind: they are normalised and stored with the others.

    Returns:
        first and second, the offsets of the first, how far behind them the second are, the mask of both.
    """
    heads = tl.arange(0, triton.next_power_of_2(HEADS))[:, None]
    pair = tl.arange(0, triton.next_power_of_2(DIM // 2))[None, :]
    mask = (heads < HEADS) & (pair < DIM // 2)
    if ROTARY_DIM == DIM:
        offs = heads * DIM + pair
        apart = DIM // 2
    else:
        rotates = pair < ROTARY_DIM // 2
        offs = heads * DIM + pair + tl.where(rotates, 0, ROTARY_DIM // 2)
        apart = tl.where(rotates, ROTARY_DIM // 2, (DIM - ROTARY_DIM) // 2)
    a = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + offs + apart, mask=mask, other=0.0).to(tl.float32)
    return a, b, offs, apart, mask


@triton.jit
def _load_turns(row_ptr, DIM: tl.constexpr, ROTARY_DIM: tl.constexpr):
    """Cosine and sine for each pair of `_load_pairs`: 1 and 0 where nothing rotates."""
    pair = tl.arange(0, triton.next_power_of_2(DIM // 2))[None, :]
    mask = pair < ROTARY_DIM // 2
    # In a head that rotates as a whole nobody reads what is masked, and the zeros of the sines can be had for nothing.
    cos = tl.load(row_ptr + pair, mask=mask, other=1.0 if ROTARY_DIM < DIM else 0.0)
    sin = tl.load(row_ptr + pair + ROTARY_DIM // 2, mask=mask, other=0.0)
    return cos, sin


@triton.jit
def _quantised(x, inverse_scale, MAX: tl.constexpr):
    """What of x goes into a cache: x itself if there is no scale; NaN stays NaN."""
    if inverse_scale is not None:
        x = tl.clamp(x.to(tl.float32) * inverse_scale, -MAX, MAX, propagate_nan=tl.PropagateNan.ALL)
        x = x.to(tl.float8e4nv)
    return x


@triton.jit
def _norm_rope_store(
    a,
    b,
    offs,
    apart,
    mask,
    norm_ptr,
    eps,
    cos,
    sin,
    out_ptr,
    inverse_scale,
    DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    MAX: tl.constexpr,
):
    """Normalise, rotate and write to out_ptr what `_load_pairs` gave, see `_quantised`."""
    if norm_ptr is not None:
        rstd = tl.rsqrt(tl.sum(a * a + b * b, 1) / DIM + eps)[:, None]
        norm_a, norm_b, _, _, _ = _load_pairs(norm_ptr, 1, DIM, ROTARY_DIM)
        a *= rstd * norm_a
        b *= rstd * norm_b
    tl.store(out_ptr + offs, _quantised(a * cos - b * sin, inverse_scale, MAX), mask=mask)
    tl.store(out_ptr + offs + apart, _quantised(b * cos + a * sin, inverse_scale, MAX), mask=mask)


@triton.jit
def _rope_store_kernel(
    qkv_ptr,
    qkv_stride,
    cos_sin_ptr,
    positions_ptr,
    slots_ptr,
    k_cache_ptr,
    v_cache_ptr,
    q_norm_ptr,
    k_norm_ptr,
    eps,
    q_ptr,
    k_inverse_scale,
    v_inverse_scale,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    MAX: tl.constexpr,
    PDL: tl.constexpr,
):
    """Arguments of `rope_store_kvcache`; a program has one row."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    cos, sin = _load_turns(cos_sin_ptr + tl.load(positions_ptr + row).to(tl.int64) * ROTARY_DIM, DIM, ROTARY_DIM)
    pdl_wait(PDL)
    # All loads come before the first store: the compiler cannot know that they do not overlap.
    q = qkv_ptr + row * qkv_stride
    k = q + Q_HEADS * DIM
    q_a, q_b, q_offs, q_apart, q_mask = _load_pairs(q, Q_HEADS, DIM, ROTARY_DIM)
    k_a, k_b, k_offs, k_apart, k_mask = _load_pairs(k, KV_HEADS, DIM, ROTARY_DIM)
    v_offs = tl.arange(0, triton.next_power_of_2(KV_HEADS * DIM))
    v_mask = v_offs < KV_HEADS * DIM
    v = tl.load(k + KV_HEADS * DIM + v_offs, mask=v_mask)
    q_out = q_ptr + row * (Q_HEADS * DIM)
    _norm_rope_store(q_a, q_b, q_offs, q_apart, q_mask, q_norm_ptr, eps, cos, sin, q_out, None, DIM, ROTARY_DIM, MAX)
    if slot >= 0:
        before = slot * (KV_HEADS * DIM)
        k_out = k_cache_ptr + before
        _norm_rope_store(
            k_a, k_b, k_offs, k_apart, k_mask, k_norm_ptr, eps, cos, sin, k_out, k_inverse_scale, DIM, ROTARY_DIM, MAX
        )
        tl.store(v_cache_ptr + before + v_offs, _quantised(v, v_inverse_scale, MAX), mask=v_mask)


def rope_store_kvcache_torch(
    qkv: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> Tensor:
    """What `rope_store_kvcache` computes, said plainly."""
    kv_heads, dim = k_cache.shape[-2:]
    q, k, v = qkv.view(len(qkv), -1, dim).tensor_split((-2 * kv_heads, -kv_heads), dim=1)
    cos, sin = cos_sin[positions.long(), None].chunk(2, dim=-1)
    pairs = cos.size(-1)

    def norm_rope(x: Tensor, weight: Tensor | None) -> Tensor:
        x = x.float()
        x = x if weight is None else rms_norm_torch(x, weight, eps)
        a, b, rest = x.tensor_split((pairs, 2 * pairs), dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)

    stored = slot_mapping >= 0
    slots = slot_mapping[stored].long()
    k_cache.view(-1, kv_heads, dim)[slots] = quantised(norm_rope(k, k_norm)[stored], k_scale, k_cache.dtype)
    v_cache.view(-1, kv_heads, dim)[slots] = quantised(v[stored], v_scale, v_cache.dtype)
    return norm_rope(q, q_norm).to(qkv.dtype)


def quantised(x: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """x as a cache of `dtype` has it: divided by the scale and within +-E4M3_MAX, if that is FP8."""
    return (x.float() * (1.0 / scale)).clamp(-E4M3_MAX, E4M3_MAX).to(dtype) if dtype == E4M3 else x.to(dtype)


def rope_store_kvcache(
    qkv: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> Tensor:
    """Rotates q and k (Su et al., 2021; the "rotate half" order), returns q and stores k and v in their slots.

    Arithmetic in float32. `positions` and `slot_mapping` are read early, by the rule of `pdl_wait`.

    Args:
        qkv: [N, (Hq + 2 Hkv) D], the fused projection's rows, any distance apart; D is even.
        cos_sin: float32 [max_position, R], R/2 cosines, then R/2 sines; R is even. The first R <= D dimensions of a
            head rotate.
        positions: int [N].
        slot_mapping: int [N], slot = block * block_size + offset; -1 (padding): that row's K and V are not stored.
        k_cache: [num_blocks, block_size, Hkv, D], contiguous, in qkv's dtype or FP8.
        v_cache: the same.
        q_norm: [D], the weight of an RMSNorm of every query head before the rotation; with k_norm, or neither.
        k_norm: [D], that of the key heads.
        eps: of both norms.
        k_scale: in an FP8 cache stands what is stored of keys divided by this, at most +-E4M3_MAX.
        v_scale: the same of values.

    Returns:
        q, [N, Hq, D] in qkv's dtype, contiguous.
    """
    if not use_triton(qkv):
        return rope_store_kvcache_torch(
            qkv, cos_sin, positions, slot_mapping, k_cache, v_cache, q_norm, k_norm, eps, k_scale, v_scale
        )
    kv_heads, dim = k_cache.shape[-2:]
    heads = qkv.size(1) // dim - 2 * kv_heads
    is_fp8 = k_cache.dtype == E4M3
    q = torch.empty((len(qkv), heads, dim), dtype=qkv.dtype, device=qkv.device)
    _rope_store_kernel[(len(qkv),)](
        qkv,
        qkv.stride(0),
        cos_sin,
        positions,
        slot_mapping,
        k_cache,
        v_cache,
        q_norm,
        k_norm,
        eps,
        q,
        1.0 / k_scale if is_fp8 else None,
        1.0 / v_scale if is_fp8 else None,
        Q_HEADS=heads,
        KV_HEADS=kv_heads,
        DIM=dim,
        ROTARY_DIM=cos_sin.size(1),
        MAX=E4M3_MAX,
        num_warps=4,
        **pdl_options(qkv.device),
    )
    return q
