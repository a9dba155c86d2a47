# ruff: noqa: ANN001, ANN202 (Gluon types the arguments of its kernels itself)
"""`linear` of some rows, up to 64, as Hopper wants it.

So many rows are for tensor cores, and yet the weights' way from memory is all that counts. A program here is two
groups of warps: one brings the weights of some features and all rows, part of K by part, to shared memory, by the
card's copy engine and as far ahead as there is room; the other multiplies. The weights are on their way before the
rows exist: see `pdl_wait`. Written in Gluon, as `prefill_hopper` says.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nanovllm.kernels import pdl_options, triton
from nanovllm.kernels.activation import Gate, gate_and_mul
from nanovllm.kernels.prefill_hopper import LAYOUT_DTYPES, ROWS, load_tile
from nanovllm.kernels.tuning import LARGE_WEIGHT_BYTES, hopper_rows_tile

BLOCK_K = gl.constexpr(128)


@gluon.jit
def _bring_parts(
    x_desc,
    w_desc,
    block,
    num_results,
    ring,
    PARTS: gl.constexpr,
    MATRICES: gl.constexpr,
    STAGES: gl.constexpr,
    IS_LATE: gl.constexpr,
):
    """Loads all PARTS of K of the rows, and of the block-th features of each of the matrices, into the ring.

    ring: parts of rows [STAGES, ROWS, BLOCK_K], of weights [STAGES * MATRICES, features, BLOCK_K], and of each stage a
    barrier that says when it can be read, and one when it has been.
    """
    x_tiles, w_tiles, ready, free = ring
    num_bytes: gl.constexpr = x_desc.block_type.nbytes + MATRICES * w_desc.block_type.nbytes
    for part in range(STAGES):
        mbarrier.expect(ready.index(part), num_bytes)
        _bring_weights(w_desc, block, num_results, part, part, ready, w_tiles, MATRICES)
    gdc_wait()
    for part in range(PARTS):
        stage = part % STAGES
        if part >= STAGES:
            mbarrier.wait(free.index(stage), part // STAGES & 1 ^ 1)
            mbarrier.expect(ready.index(stage), num_bytes)
            _bring_weights(w_desc, block, num_results, part, stage, ready, w_tiles, MATRICES)
        # What is in the tile behind the rows that there are, only results have to do with that nobody stores.
        x_tile = x_tiles.index(stage).slice(0, x_desc.block_type.shape[0])
        load_tile(x_desc, [0, part * BLOCK_K], ready.index(stage), x_tile)
    if IS_LATE:
        gdc_launch_dependents()


@gluon.jit
def _bring_weights(w_desc, block, num_results, part, stage, ready, w_tiles, MATRICES: gl.constexpr):
    for matrix in gl.static_range(MATRICES):
        at = [block * w_desc.block_type.shape[0] + matrix * num_results, part * BLOCK_K]
        load_tile(w_desc, at, ready.index(stage), w_tiles.index(stage * MATRICES + matrix))


@gluon.jit
def _load_bias(bias_ptr, n, num_results):
    return gl.load(bias_ptr + n, mask=n < num_results, other=0.0).to(gl.float32)[None, :]


@gluon.jit
def _multiply_parts(
    ring,
    bias_ptr,
    norm_ptr,
    eps,
    y_ptr,
    y_stride,
    rows,
    block,
    num_results,
    destination,
    BLOCK_N: gl.constexpr,
    K: gl.constexpr,
    PARTS: gl.constexpr,
    MATRICES: gl.constexpr,
    STAGES: gl.constexpr,
    GATE: gl.constexpr,
    ADDED: gl.constexpr,
):
    """The block-th results of all rows, of what arrives in the ring."""
    x_tiles, w_tiles, ready, free = ring
    dtype: gl.constexpr = y_ptr.dtype.element_ty
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    x_layout: gl.constexpr = gl.DotOperandLayout(0, layout, k_width=2)
    k = gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, x_layout))
    m = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    n = block * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, layout))
    offs = m[:, None] * y_stride + n[None, :]
    mask = (m < rows)[:, None] & (n < num_results)[None, :]
    y = gl.zeros([ROWS, BLOCK_N], gl.float32, layout)
    up = gl.zeros([ROWS, BLOCK_N], gl.float32, layout)
    squares = gl.zeros([ROWS, BLOCK_K], gl.float32, x_layout)
    gdc_wait()
    if ADDED:
        residual = gl.load(y_ptr + offs, mask=mask, other=0.0).to(gl.float32)
    for part in range(PARTS):
        stage = part % STAGES
        if norm_ptr is not None:
            norm = gl.load(norm_ptr + part * BLOCK_K + k, mask=part * BLOCK_K + k < K, other=0.0)[None, :]
        mbarrier.wait(ready.index(stage), part // STAGES & 1)
        x = x_tiles.index(stage)
        if norm_ptr is not None:
            h = x.load(x_layout)
            x = (h * norm).to(dtype)
            h = h.to(gl.float32)
            squares += h * h
        y = warpgroup_mma(x, w_tiles.index(stage * MATRICES).permute((1, 0)), y, is_async=True)
        if GATE is not None:
            up = warpgroup_mma(x, w_tiles.index(stage * MATRICES + 1).permute((1, 0)), up, is_async=True)
        y, up = warpgroup_mma_wait(0, deps=[y, up])
        mbarrier.arrive(free.index(stage))
    if norm_ptr is not None:
        scale = gl.convert_layout(gl.rsqrt(gl.sum(squares, 1) / K + eps), gl.SliceLayout(1, layout))[:, None]
        y *= scale
        up *= scale
    if bias_ptr is not None:
        y += _load_bias(bias_ptr, n, num_results)
        if GATE is not None:
            up += _load_bias(bias_ptr + num_results, n, num_results)
    if GATE is not None:
        y = gate_and_mul(y, up, GATE)
    if ADDED:
        y += residual
    if destination is None:
        gl.store(y_ptr + offs, y.to(dtype), mask=mask)
    else:
        _send(y.to(dtype), m[:, None] * num_results + n[None, :], mask, rows * num_results, destination)


@gluon.jit
def _send(values, offs, mask, stride, destination):
    """What `parallel.all_reduce.send` does, with the layouts that Gluon gives values."""
    addresses, offset, rank = destination
    for peer in gl.static_range(len(addresses)):
        place_ptr = (addresses[peer] + offset).to(gl.pointer_type(values.dtype))
        gl.store(place_ptr + rank * stride + offs, values, mask=mask)


@gluon.jit(do_not_specialize=["rows"])
def _linear_kernel(
    x_desc,
    w_desc,
    bias_ptr,
    norm_ptr,
    eps,
    y_ptr,
    y_stride,
    rows,
    num_results,
    destination,
    K: gl.constexpr,
    GATE: gl.constexpr,
    ADDED: gl.constexpr,
    STAGES: gl.constexpr,
    IS_LATE: gl.constexpr,
    PDL: gl.constexpr,
):
    """BLOCK_N results of all rows; with a gate they are made of two matrices, gates and ups."""
    dtype: gl.constexpr = y_ptr.dtype.element_ty
    BLOCK_N: gl.constexpr = w_desc.block_type.shape[0]
    PARTS: gl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    MATRICES: gl.constexpr = 1 if GATE is None else 2
    block = gl.program_id(0)
    if not IS_LATE:
        gdc_launch_dependents()
    x_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, BLOCK_K], dtype)
    x_tiles = gl.allocate_shared_memory(dtype, [STAGES, ROWS, BLOCK_K], x_layout)
    w_tiles = gl.allocate_shared_memory(dtype, [STAGES * MATRICES, BLOCK_N, BLOCK_K], w_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(free.index(stage), count=1)
    fence_async_shared()
    ring = (x_tiles, w_tiles, ready, free)
    gl.warp_specialize(
        [
            (
                _multiply_parts,
                (
                    ring,
                    bias_ptr,
                    norm_ptr,
                    eps,
                    y_ptr,
                    y_stride,
                    rows,
                    block,
                    num_results,
                    destination,
                    BLOCK_N,
                    K,
                    PARTS,
                    MATRICES,
                    STAGES,
                    GATE,
                    ADDED,
                ),
            ),
            (_bring_parts, (x_desc, w_desc, block, num_results, ring, PARTS, MATRICES, STAGES, IS_LATE)),
        ],
        worker_num_warps=[1],
        worker_num_regs=[24],
    )


def launch_linear_hopper(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Tensor | None,
    eps: float,
    y: Tensor,
    gate: Gate | None,
    is_added: bool,
    destination: tuple | None = None,
) -> None:
    """`linear` of what `takes_hopper_rows` says, into y, or added to it; or as packets to all ranks' `destination`.

    That is their addresses, the offset of the packets' place, and this rank.
    """
    rows, size = x.shape
    matrices = 1 if gate is None else 2
    num_results = len(weight) // matrices
    block_n, stages = hopper_rows_tile(num_results, size, matrices, weight.nbytes >= LARGE_WEIGHT_BYTES)
    dtype = LAYOUT_DTYPES[x.dtype]

    def describe(tensor: Tensor, height: int, tile_height: int) -> TensorDescriptor:
        layout = gl.NVMMASharedLayout.get_default_for([tile_height, BLOCK_K.value], dtype)
        return TensorDescriptor.from_tensor(tensor, [height, BLOCK_K.value], layout)

    _linear_kernel[(triton.cdiv(num_results, block_n),)](
        describe(x, max(8, triton.next_power_of_2(rows)), ROWS.value),
        describe(weight, block_n, block_n),
        bias,
        norm,
        eps,
        y,
        y.stride(0),
        rows,
        num_results,
        destination,
        K=size,
        GATE=gate,
        ADDED=is_added,
        STAGES=stages,
        IS_LATE=weight.nbytes >= LARGE_WEIGHT_BYTES,
        num_warps=4,
        **pdl_options(x.device),
    )
