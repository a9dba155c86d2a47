# ruff: noqa: ANN001, ANN201, ANN202 (Triton types the arguments of its kernels itself)
"""What the kernels of linear layers do with the rows that they have multiplied. Knows nothing of weights."""

from nanovllm.kernels import tl, triton
from nanovllm.kernels.activation import gate_and_mul


@triton.jit
def store_rows(y, offs, mask, y_ptr, destination) -> None:
    """Where a product's rows go if not to other ranks; `destination` says where those are."""
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _results_at(block, y_stride, rows, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GATE: tl.constexpr):
    """Where the results of the block-th BLOCK_N features are stored, and which of them there are."""
    SHARE: tl.constexpr = 2 if GATE is not None else 1
    m = tl.arange(0, BLOCK_M)
    n = block * (BLOCK_N // SHARE) + tl.arange(0, BLOCK_N // SHARE)
    return m[:, None] * y_stride + n[None, :], (m < rows)[:, None] & (n < N // SHARE)[None, :]


@triton.jit
def load_addends(
    block, features, bias_ptr, y_ptr, y_stride, rows, N, BLOCK_M: tl.constexpr, GATE: tl.constexpr, ADDED: tl.constexpr
):
    """What `finish_rows` adds, float32: the bias, and what y_ptr has; 0 where there is none.

    With few rows a kernel is a chain of waits: these are to be read before the rows are, not at the end. There the
    compiler would move the loads, but for the barrier.
    """
    BLOCK_N: tl.constexpr = features.shape[0]
    bias = tl.zeros((1, BLOCK_N), tl.float32)
    if bias_ptr is not None:
        mask_n = block * BLOCK_N + tl.arange(0, BLOCK_N) < N
        bias = tl.load(bias_ptr + features, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    residual = tl.zeros((1, 1), tl.float32)
    if ADDED:
        offs, mask = _results_at(block, y_stride, rows, N, BLOCK_M, BLOCK_N, GATE)
        residual = tl.load(y_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None or ADDED:
        tl.debug_barrier()
    return bias, residual


@triton.jit
def finish_rows(y, addends, block, y_ptr, y_stride, rows, N, destination, GATE: tl.constexpr, STORE: tl.constexpr):
    """Adds the bias to y, float32 [BLOCK_M, BLOCK_N], applies the gate, adds the residual, and stores.

    y is the block-th of all; its columns are features in order, with a gate a gate beside its up. Of its rows `rows`
    count, N is the number of features before the gate.
    """
    BLOCK_M: tl.constexpr = y.shape[0]
    BLOCK_N: tl.constexpr = y.shape[1]
    bias, residual = addends
    y += bias
    if GATE is not None:
        gate, up = tl.split(tl.reshape(y, (BLOCK_M, BLOCK_N // 2, 2)))
        y = gate_and_mul(gate, up, GATE)
    offs, mask = _results_at(block, y_stride, rows, N, BLOCK_M, BLOCK_N, GATE)
    STORE(y + residual, offs, mask, y_ptr, destination)
