# ruff: noqa: ANN001, ANN202 (Triton types the arguments of its kernels itself)
"""Which experts compute a token, by how much each counts, and which tokens an expert computes."""

from typing import NamedTuple

import torch
from torch import Tensor

from nanovllm.kernels import pdl_options, pdl_wait, tl, triton, use_triton
from nanovllm.kernels.tuning import FEW_TOKENS, ROUTED_TOKENS


class Routing(NamedTuple):
    """The experts of T tokens, of which each has K.

    Attributes:
        weights: float32 [T, K], how much an expert counts.
        experts: int32 [T, K], the most probable first.
        counts: int32 [E], the tokens of each expert; zeroed by whoever is the last to read it.
        order: int32 [E, T], of each expert its pairs token * K + place among the token's experts, as many as `counts`
            says, in any order; None for up to FEW_TOKENS, of which nobody asks for it.
    """

    weights: Tensor
    experts: Tensor
    counts: Tensor
    order: Tensor | None


@triton.jit(do_not_specialize=["num_tokens"])
def _route_kernel(
    logits_ptr,
    weights_ptr,
    experts_ptr,
    counts_ptr,
    order_ptr,
    num_tokens,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    RENORMALISED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PDL: tl.constexpr,
):
    """The experts of BLOCK_T tokens."""
    LOWEST: tl.constexpr = -3e38
    TOP_K_PAD: tl.constexpr = triton.next_power_of_2(TOP_K)
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = tokens < num_tokens
    ids = tl.arange(0, triton.next_power_of_2(EXPERTS))[None, :]
    slots = tl.arange(0, TOP_K_PAD)[None, :]
    pdl_wait(PDL)
    is_expert = (ids < EXPERTS) & mask_t[:, None]
    logits = tl.load(logits_ptr + tokens[:, None] * EXPERTS + ids, mask=is_expert, other=float("-inf")).to(tl.float32)
    # NaN is above nothing, so that even a row of them has TOP_K different experts.
    left = tl.where(is_expert, tl.where(logits > LOWEST, logits, LOWEST), float("-inf"))
    highest = tl.max(left, 1)
    experts = tl.zeros((BLOCK_T, TOP_K_PAD), tl.int32)
    weights = tl.zeros((BLOCK_T, TOP_K_PAD), tl.float32)
    for slot in tl.static_range(TOP_K):
        best, expert = tl.max(left, 1, return_indices=True)  # of equals, the first
        left = tl.where(ids == expert[:, None], float("-inf"), left)
        experts = tl.where(slots == slot, expert[:, None], experts)
        weights = tl.where(slots == slot, tl.exp(best - highest)[:, None], weights)
        if order_ptr is not None:
            rank = tl.atomic_add(counts_ptr + expert, 1, mask=mask_t, sem="relaxed")
            tl.store(order_ptr + expert * num_tokens + rank, tokens * TOP_K + slot, mask=mask_t)
    total = tl.sum(weights, 1) if RENORMALISED else tl.sum(tl.exp(logits - highest[:, None]), 1)
    offs = tokens[:, None] * TOP_K + slots
    mask = mask_t[:, None] & (slots < TOP_K)
    tl.store(weights_ptr + offs, weights / total[:, None], mask=mask)
    tl.store(experts_ptr + offs, experts, mask=mask)


def route_torch(logits: Tensor, top_k: int, is_renormalised: bool, counts: Tensor) -> Routing:
    """What `route` computes, said plainly."""
    probabilities = logits.float().softmax(-1)
    weights, experts = probabilities.sort(dim=-1, descending=True, stable=True)
    weights, experts = weights[:, :top_k], experts[:, :top_k]
    if is_renormalised:
        weights = weights / weights.sum(-1, keepdim=True)
    order = None
    if len(logits) > FEW_TOKENS:
        counts += experts.flatten().bincount(minlength=len(counts)).int()
        # Within an expert's row, its tokens first.
        order = torch.zeros(len(counts), len(logits), dtype=torch.int32, device=logits.device)
        for expert in range(len(counts)):
            pairs = (experts.flatten() == expert).nonzero().flatten()
            order[expert, : len(pairs)] = pairs
    return Routing(weights.contiguous(), experts.int().contiguous(), counts, order)


def route(logits: Tensor, top_k: int, is_renormalised: bool, counts: Tensor) -> Routing:
    """The top_k most probable experts of each token, of equals the first, with softmax for weights.

    Args:
        logits: [T, E], any float type, contiguous.
        top_k: experts of a token, at most E.
        is_renormalised: a token's weights sum to 1; else they are the probabilities among all experts.
        counts: int32 [E], zeros, which become those of the result.
    """
    if not use_triton(logits):
        return route_torch(logits, top_k, is_renormalised, counts)
    num_tokens, num_experts = logits.shape
    weights = torch.empty((num_tokens, top_k), dtype=torch.float32, device=logits.device)
    experts = torch.empty((num_tokens, top_k), dtype=torch.int32, device=logits.device)
    order = None
    if num_tokens > FEW_TOKENS:
        order = torch.empty((num_experts, num_tokens), dtype=torch.int32, device=logits.device)
    _route_kernel[(triton.cdiv(num_tokens, ROUTED_TOKENS),)](
        logits,
        weights,
        experts,
        counts,
        order,
        num_tokens,
        EXPERTS=num_experts,
        TOP_K=top_k,
        RENORMALISED=is_renormalised,
        BLOCK_T=ROUTED_TOKENS,
        num_warps=ROUTED_TOKENS,
        **pdl_options(logits.device),
    )
    return Routing(weights, experts, counts, order)
