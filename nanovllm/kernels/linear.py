# ruff: noqa: ANN001, ANN202 (Triton types the arguments of its kernels itself)
"""y = x W^T for few rows, with the norm before it and the activation or the residual addition after it fused in.

With few rows a linear layer is a read of its weights, and a decode step a chain of short reads. Where kernels can
start before the one ahead of them ends (`pdl_options`), this one loads weights, which nobody writes, before it waits.
"""

import torch
from torch import Tensor

from nanovllm.kernels import pdl_options, pdl_wait, tl, triton, use_triton
from nanovllm.kernels.activation import GATES, Gate
from nanovllm.kernels.cpu_products import CpuWeight
from nanovllm.kernels.linear_rows import finish_rows, load_addends, store_rows
from nanovllm.kernels.quantized_linear import launch_quantized_linear
from nanovllm.kernels.quantized_products import linear_quantized
from nanovllm.kernels.quantized_row import launch_row, takes_row
from nanovllm.kernels.quantized_weight import QuantizedWeight
from nanovllm.kernels.rms_norm import rms_norm
from nanovllm.kernels.tuning import (
    LARGE_WEIGHT_BYTES,
    SMALL_BATCH,
    SMALL_BATCH_OF_LARGE,
    TILES,
    fitting_warps,
    gpu_of,
    hopper_rows_pay,
)


@triton.jit(do_not_specialize=["rows"])
def _linear_kernel(
    x_ptr,
    x_stride,
    weight_ptr,
    bias_ptr,
    norm_ptr,
    eps,
    y_ptr,
    y_stride,
    rows,
    N,
    destination,
    K: tl.constexpr,
    GATE: tl.constexpr,
    ADDED: tl.constexpr,
    STORE: tl.constexpr,
    IS_LATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WARPS: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK_N features of all rows, by one program.

    Its warps split K, BLOCK_K each at a time: axis 0 of the tiles is the warp. It is long because it is one pass: what
    is fused in has no place outside of it.
    """
    STEP: tl.constexpr = WARPS * BLOCK_K
    GATED: tl.constexpr = GATE is not None
    features = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = features < N
    if GATED:  # a gate beside its up
        features = features // 2 + features % 2 * (N // 2)
    m = tl.arange(0, BLOCK_M)
    k = tl.arange(0, WARPS)[:, None, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, None, :]
    w_ptr = weight_ptr + features.to(tl.int64)[None, :, None] * K + k
    w = tl.load(w_ptr, mask=mask_n[None, :, None] & (k < K), other=0.0)
    if norm_ptr is not None:
        norm = tl.load(norm_ptr + k, mask=k < K, other=0.0)
    pdl_wait(PDL, LAUNCH=not IS_LATE)
    block = tl.program_id(0)
    addends = load_addends(block, features, bias_ptr, y_ptr, y_stride, rows, N, BLOCK_M, GATE, ADDED)
    x_ptr += m[None, :, None] * x_stride + k
    mask_m = (m < rows)[None, :, None]
    x = tl.load(x_ptr, mask=mask_m & (k < K), other=0.0)
    acc = tl.zeros((WARPS, BLOCK_M, BLOCK_N), tl.float32)
    squares = tl.zeros((WARPS, BLOCK_M), tl.float32)
    for ahead in tl.range(STEP, K + STEP, STEP, num_stages=1):
        left = ahead + k < K
        next_w = tl.load(w_ptr + ahead, mask=mask_n[None, :, None] & left, other=0.0)
        next_x = tl.load(x_ptr + ahead, mask=mask_m & left, other=0.0)
        if norm_ptr is not None:
            h = x.to(tl.float32)
            squares += tl.sum(h * h, 2)
            x = h * norm.to(tl.float32)
            if BLOCK_M > 1 or w.dtype != tl.float16:  # one row need not fit into float16 yet, see `normalises_apart`
                x = x.to(w.dtype)
            norm = tl.load(norm_ptr + ahead + k, mask=left, other=0.0)
        if BLOCK_M == 1:  # too little to multiply for the tensor cores to pay
            acc += tl.sum(x.to(tl.float32) * w.to(tl.float32), 2)[:, None, :]
        else:
            acc = tl.dot(x, tl.trans(w, 0, 2, 1), acc, input_precision="ieee")
        w, x = next_w, next_x
    if PDL and IS_LATE:
        tl.extra.cuda.gdc_launch_dependents()
    y = tl.sum(acc, 0)
    if norm_ptr is not None:
        y *= tl.rsqrt(tl.sum(squares, 0) / K + eps)[:, None]
    finish_rows(y, addends, block, y_ptr, y_stride, rows, N, destination, GATE, STORE)


def linear_torch(
    x: Tensor,
    weight: Tensor | QuantizedWeight | CpuWeight,
    bias: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    gate: Gate | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """What `linear` computes, one operation after another; also its way with many rows, perhaps into `out`."""
    if isinstance(weight, QuantizedWeight):
        if use_triton(x):
            return linear_quantized(x, weight, bias, norm, eps, residual, gate, out)
        weight = weight.dequantize(x.dtype)
    if norm is not None:
        x = rms_norm(x, norm, eps)
    if isinstance(weight, CpuWeight):
        y = weight.multiply(x)
        y = y if bias is None else y.add_(bias)
    elif residual is not None and bias is None and gate is None:
        return residual.addmm_(x, weight.t())
    else:
        y = torch.mm(x, weight.t(), out=out) if bias is None else torch.addmm(bias, x, weight.t(), out=out)
    if gate is not None:
        y = GATES[gate](y)
    return y if residual is None else residual.add_(y)


def linear(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    bias: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    gate: Gate | None = None,
) -> Tensor:
    """y = x W^T + bias, of normalised rows, through a gate, onto a residual.

    x: [M, K], rows any distance apart, elements of a row contiguous. weight: [N, K], contiguous, or in few bits.
    bias: [N]. norm: [K], the weight of an RMSNorm of x's rows with `eps`. gate: the features are N/2 gates, then N/2
    ups, and y is activation(gates) * ups. residual: [M, N] (gated: [M, N/2]), not overlapping x; y is added to it in
    place and it is returned. All in one dtype: float32, float16 or bfloat16, but that norm may be float32; sums in
    float32. Returns [M, N] (gated: [M, N/2]).
    """
    rows, num_features = len(x), len(weight)
    if isinstance(weight, QuantizedWeight) and weight.order is not None and use_triton(x):
        weight, x, norm = weight.in_order_of_columns(x, norm)
    is_normed = norm is not None
    is_hoppers = takes_hopper_rows(x, weight, is_normed)
    if not is_hoppers and not takes_few_rows(x, weight, is_normed):
        return linear_torch(x, weight, bias, norm, eps, residual, gate)
    if is_normed and normalises_apart(x, weight):
        x, norm = rms_norm(x, norm, eps), None
    y = residual
    if y is None:
        y = torch.empty((rows, num_features // 2 if gate else num_features), dtype=x.dtype, device=x.device)
    launch = launch_linear
    if is_hoppers:
        from nanovllm.kernels.linear_hopper import launch_linear_hopper as launch
    launch(x, weight, bias, norm, eps, y, gate, is_added=residual is not None)
    return y


def normalises_apart(x: Tensor, weight: Tensor | QuantizedWeight) -> bool:
    """Whether rows are normalised ahead of the kernel, which else divides by the root mean square last.

    So it is in float16, which may not hold a number times the norm's weight before that division. Of one row kernels
    multiply what float32 has, or what they have scaled.
    """
    is_one = takes_row(x, weight) if isinstance(weight, QuantizedWeight) else len(x) == 1
    return x.dtype == torch.float16 and not is_one


def takes_hopper_rows(x: Tensor, weight: Tensor | QuantizedWeight, is_normed: bool) -> bool:
    """Whether Hopper's own kernel can compute x W^T, which copies runs of 16 bytes, and is faster than others."""
    if not use_triton(x) or isinstance(weight, QuantizedWeight) or x.dtype == torch.float32:
        return False
    is_aligned = x.stride(0) % 8 == 0 and x.size(1) % 8 == 0 and x.data_ptr() % 16 == 0
    return is_aligned and gpu_of(x.device).is_hopper and hopper_rows_pay(len(x), weight.nbytes, is_normed)


def takes_few_rows(x: Tensor, weight: Tensor | QuantizedWeight, is_normed: bool = False) -> bool:
    """Whether a kernel for few rows can compute x W^T, and is faster than what `linear_torch` does."""
    if not use_triton(x):
        return False
    limit = SMALL_BATCH
    if isinstance(weight, QuantizedWeight):
        limit = 0 if not weight.is_readable else 1 if weight.rounds_input else SMALL_BATCH
    elif is_normed and weight.nbytes >= LARGE_WEIGHT_BYTES:
        limit = SMALL_BATCH_OF_LARGE
    return 0 < len(x) <= limit


def launch_linear(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    bias: Tensor | None,
    norm: Tensor | None,
    eps: float,
    y: Tensor | None,
    gate: Gate | None,
    is_added: bool,
    store: triton.JITFunction = store_rows,
    destination: tuple | None = None,
) -> None:
    """Launches the kernel for up to SMALL_BATCH rows; `store` is the device function that takes its rows."""
    if isinstance(weight, QuantizedWeight):
        launch = launch_row if takes_row(x, weight) else launch_quantized_linear
        launch(x, weight, bias, norm, eps, y, gate, is_added, store, destination)
        return
    rows, (num_features, size) = len(x), weight.shape
    is_large = weight.nbytes >= LARGE_WEIGHT_BYTES
    tiles_of_rows = TILES[(rows > 1) + (rows > 4)]
    block_n, block_k, warps = tiles_of_rows[(num_features > 2048) + (num_features > 4096) + (num_features > 8192)]
    if is_large and rows == 1:  # two GPUs, one request on Qwen3-8B: a step 3% shorter
        block_n = 4
    whole_k = max(triton.next_power_of_2(size), 16)
    block_k = min(block_k, whole_k)
    block_m = triton.next_power_of_2(rows)
    warps = fitting_warps(min(warps, whole_k // block_k), block_m, block_n, block_k, x.dtype, gpu_of(x.device))
    _linear_kernel[(triton.cdiv(num_features, block_n),)](
        x,
        x.stride(0),
        weight,
        bias,
        norm,
        eps,
        y,
        num_features if y is None else y.stride(0),
        rows,
        num_features,
        destination,
        K=size,
        GATE=gate,
        ADDED=is_added,
        STORE=store,
        IS_LATE=is_large,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        WARPS=warps,
        num_warps=warps,
        **pdl_options(x.device),
    )
