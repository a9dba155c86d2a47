# ruff: noqa: ANN001, ANN201 (Triton types the arguments of its kernels itself)
"""What the kernels of linear layers do with the rows that they have multiplied. Knows nothing of weights."""

from nanovllm.kernels import tl, triton
from nanovllm.kernels.activation import gate_and_mul


@triton.jit
def store_rows(y, offs, mask, y_ptr, destination) -> None:
    """Where a product's rows go if not to other ranks; `destination` says where those are."""
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def finish_rows(
    y,
    block,
    features,
    bias_ptr,
    y_ptr,
    y_stride,
    rows,
    N,
    destination,
    GATE: tl.constexpr,
    ADDED: tl.constexpr,
    STORE: tl.constexpr,
):
    """Adds the bias to y, float32 [BLOCK_M, BLOCK_N], applies the gate, adds what y_ptr has, and stores.

    y is the block-th of all; `features` are those of its columns, with a gate a gate beside its up. Of its rows `rows`
    count, N is the number of features before the gate.
    """
    BLOCK_M: tl.constexpr = y.shape[0]
    BLOCK_N: tl.constexpr = y.shape[1]
    SHARE: tl.constexpr = 2 if GATE is not None else 1
    m = tl.arange(0, BLOCK_M)
    if bias_ptr is not None:
        mask_n = block * BLOCK_N + tl.arange(0, BLOCK_N) < N
        y += tl.load(bias_ptr + features, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    if GATE is not None:
        gate, up = tl.split(tl.reshape(y, (BLOCK_M, BLOCK_N // 2, 2)))
        y = gate_and_mul(gate, up, GATE)
    n = block * (BLOCK_N // SHARE) + tl.arange(0, BLOCK_N // SHARE)
    mask = (m < rows)[:, None] & (n < N // SHARE)[None, :]
    offs = m[:, None] * y_stride + n[None, :]
    if ADDED:
        y += tl.load(y_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    STORE(y, offs, mask, y_ptr, destination)
