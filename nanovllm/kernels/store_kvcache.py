# ruff: noqa: ANN001, ANN201, ANN202 (Triton types the arguments of its kernels itself)
"""From the fused QKV projection to a rotated query and a KV cache that holds this step's keys and values.

One kernel does per-head RMSNorm (Qwen3), the rotary embedding and the scattered store, so that q, k and v cross the
memory bus once. It knows nothing of sequences: a row has a position and a slot.
"""

import torch
from torch import Tensor

from nanovllm.kernels import pdl_options, pdl_wait, tl, triton, use_triton
from nanovllm.kernels.e4m3 import E4M3, E4M3_MAX
from nanovllm.kernels.rms_norm import rms_norm_torch
from nanovllm.kernels.rotation import load_heads, load_turn, rotate


@triton.jit
def stored(x, inverse_scale, MAX: tl.constexpr):
    """What of x goes into a cache: x itself if there is no scale; NaN stays NaN."""
    if inverse_scale is not None:
        x = tl.clamp(x.to(tl.float32) * inverse_scale, -MAX, MAX, propagate_nan=tl.PropagateNan.ALL)
        x = x.to(tl.float8e4nv)
    return x


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
    NORMED: tl.constexpr = q_norm_ptr is not None
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    cos_sin_ptr += tl.load(positions_ptr + row).to(tl.int64) * ROTARY_DIM
    q_turn = load_turn(cos_sin_ptr, q_norm_ptr, DIM, ROTARY_DIM)
    k_turn = load_turn(cos_sin_ptr, k_norm_ptr, DIM, ROTARY_DIM)
    q_heads = tl.arange(0, triton.next_power_of_2(Q_HEADS))[:, None]
    k_heads = tl.arange(0, triton.next_power_of_2(KV_HEADS))[:, None]
    dims = tl.arange(0, max(16, triton.next_power_of_2(DIM)))[None, :]
    q_mask, k_mask = (q_heads < Q_HEADS) & (dims < DIM), (k_heads < KV_HEADS) & (dims < DIM)
    q_offs, k_offs = q_heads * DIM + dims, k_heads * DIM + dims
    pdl_wait(PDL)
    # All loads come before the first store: the compiler cannot know that they do not overlap.
    q_in = qkv_ptr + row * qkv_stride
    k_in = q_in + Q_HEADS * DIM
    q = load_heads(q_in, q_heads, Q_HEADS, DIM, ROTARY_DIM)
    k = load_heads(k_in, k_heads, KV_HEADS, DIM, ROTARY_DIM)
    v = tl.load(k_in + KV_HEADS * DIM + k_offs, mask=k_mask)
    q, k = rotate(q, q_turn, eps, NORMED, DIM), rotate(k, k_turn, eps, NORMED, DIM)
    tl.store(q_ptr + row * (Q_HEADS * DIM) + q_offs, q, mask=q_mask)
    if slot >= 0:
        before = slot * (KV_HEADS * DIM)
        tl.store(k_cache_ptr + before + k_offs, stored(k, k_inverse_scale, MAX), mask=k_mask)
        tl.store(v_cache_ptr + before + k_offs, stored(v, v_inverse_scale, MAX), mask=k_mask)


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
    heads = qkv.view(len(qkv), -1, dim)
    turned, v = heads[:, :-kv_heads].float(), heads[:, -kv_heads:]
    if q_norm is not None:
        q, k = turned.tensor_split((-kv_heads,), dim=1)
        turned = torch.cat((rms_norm_torch(q, q_norm, eps), rms_norm_torch(k, k_norm, eps)), dim=1)
    cos, sin = cos_sin[positions.long(), None].chunk(2, dim=-1)
    pairs = cos.size(-1)
    a, b = turned[..., :pairs], turned[..., pairs : 2 * pairs]
    turned = torch.cat((a * cos - b * sin, b * cos + a * sin, turned[..., 2 * pairs :]), dim=-1)
    q, k = turned[:, :-kv_heads].to(qkv.dtype), turned[:, -kv_heads:]
    slots = slot_mapping.long()
    if (slots < 0).any():
        has_slot = slots >= 0
        slots, k, v = slots[has_slot], k[has_slot], v[has_slot]
    for cache, values, scale in ((k_cache, k, k_scale), (v_cache, v, v_scale)):
        cache.view(-1, kv_heads, dim)[slots] = quantised(values, scale, cache.dtype)
    return q


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
