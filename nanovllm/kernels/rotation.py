# ruff: noqa: ANN001, ANN201, ANN202 (Triton types the arguments of its kernels itself)
"""What kernels do with the heads of queries and keys before attention: the norm of each head and its rotation.

Dimension i of a head is turned together with i + ROTARY_DIM / 2, its partner (Su et al., 2021; the "rotate half"
order). Both the rotation and the weight of the norm before it multiply: their products are made once for all heads.
"""

from nanovllm.kernels import tl, triton


@triton.jit
def _dims(DIM: tl.constexpr, ROTARY_DIM: tl.constexpr):
    """The dimensions of a head and their partners, [1, DIM padded]: those that do not turn have none, but a number."""
    dims = tl.arange(0, max(16, triton.next_power_of_2(DIM)))[None, :]
    HALF: tl.constexpr = ROTARY_DIM // 2
    return dims, tl.where(dims < HALF, dims + HALF, dims - HALF)


@triton.jit
def load_turn(cos_sin_ptr, norm_ptr, DIM: tl.constexpr, ROTARY_DIM: tl.constexpr):
    """What a normalised dimension and its partner are multiplied by, float32 [1, DIM padded] each.

    cos_sin_ptr: float32 [ROTARY_DIM], a position's cosines, then its sines; norm_ptr: [DIM], the norm's weight, or
    None.
    """
    dims, partners = _dims(DIM, ROTARY_DIM)
    turns = dims < ROTARY_DIM
    pair = tl.minimum(dims, partners)
    own = tl.load(cos_sin_ptr + pair, mask=turns, other=1.0)
    partner = tl.load(cos_sin_ptr + ROTARY_DIM // 2 + pair, mask=turns, other=0.0)
    partner = tl.where(dims < ROTARY_DIM // 2, -partner, partner)
    if norm_ptr is not None:
        own *= tl.load(norm_ptr + dims, mask=dims < DIM, other=0.0).to(tl.float32)
        partner *= tl.load(norm_ptr + partners, mask=turns, other=0.0).to(tl.float32)
    return own, partner


@triton.jit
def load_heads(x_ptr, heads, HEADS: tl.constexpr, DIM: tl.constexpr, ROTARY_DIM: tl.constexpr):
    """Each dimension of the heads at x_ptr, one behind the other, and its partner, float32 [H, DIM padded] each.

    heads: [H, 1], of which those count that are smaller than HEADS.
    """
    dims, partners = _dims(DIM, ROTARY_DIM)
    x_ptr += heads * DIM
    x = tl.load(x_ptr + dims, mask=(heads < HEADS) & (dims < DIM), other=0.0).to(tl.float32)
    y = tl.load(x_ptr + partners, mask=(heads < HEADS) & (dims < ROTARY_DIM), other=0.0).to(tl.float32)
    return x, y


@triton.jit
def rotate(pairs, turn, eps, NORMED: tl.constexpr, DIM: tl.constexpr):
    """Normalises and rotates what `load_heads` gave by what `load_turn` gave: float32 [H, DIM padded]."""
    x, y = pairs
    own, partner = turn
    rotated = x * own + y * partner
    if NORMED:
        rotated *= tl.rsqrt(tl.sum(x * x, 1) / DIM + eps)[:, None]
    return rotated
