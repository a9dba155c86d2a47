"""Numbers found by measurement: what they were measured on, and what other GPUs get.

All were measured on one H200 (sm_90: 132 SMs, 227 KiB of shared memory for a program). What depends on a GPU's size is
a function of it here, so that an A100 (sm_80, 163 KiB) or an RTX 4090 or L4 (sm_89, 99 KiB) gets tiles that fit; on
those nothing was measured. The rest is the same everywhere. tests/test_other_gpus.py compiles every kernel for each of
these GPUs with the numbers that this file gives.

This file knows the shapes that kernels work on, not what they compute.
"""

import functools
from typing import NamedTuple

import torch

from nanovllm.kernels import INTERPRETED, triton


class Gpu(NamedTuple):
    """What is chosen by."""

    num_sms: int
    shared_memory: int  # bytes that one program may have; an SM has about as many for all of its programs
    is_hopper: bool = False


@functools.cache
def gpu_of(device: torch.device) -> Gpu:
    """The GPU; for the interpreter a small one with the shared memory of Hopper."""
    if INTERPRETED:
        return Gpu(num_sms=4, shared_memory=227 * 1024)
    properties = torch.cuda.get_device_properties(device)
    return Gpu(properties.multi_processor_count, properties.shared_memory_per_block_optin, properties.major == 9)


# ---- linear layers, kernels/linear.py ------------------------------------------------------------------------------

# Rows up to which the kernel beats the matrix product of the library; 0 turns it off.
SMALL_BATCH = 8

# The same of large weights, where Hopper's own kernel does the rest, or behind a norm the library. 8 rows of Qwen3-8B
# in us, in brackets the library with its norm and gate: q, k and v 21.8 (18.3), gates and ups 61.8 (54.3), the head
# 330 (307). 4 rows: 15.8, 52 and 289.
SMALL_BATCH_OF_LARGE = 4

# From this many bytes of a weight on, programs of the next kernel are in the way of this one's loads: they start when
# those are done. One request on Qwen3-8B: 238 tok/s, else 221. If all started late, one on 0.6B: 1,360, else 1,532. It
# makes no difference before Hopper, where no kernel starts early.
LARGE_WEIGHT_BYTES = 2**24

# BLOCK_N, BLOCK_K and warps for 1, up to 4 and more rows, and for up to 2,048, 4,096, 8,192 and more features: the
# fastest with the shapes of Qwen3-0.6B and 8B. Few features make few programs: each has many warps, to have all of its
# weights on the way at once. A program takes up to 64 KiB of shared memory, 128 in float32: see `fitting_warps`.
TILES = (
    ((8, 256, 16), (8, 256, 4), (16, 256, 4), (8, 256, 4)),
    ((8, 256, 8), (8, 128, 4), (16, 128, 4), (32, 64, 4)),
    ((8, 256, 8), (16, 64, 8), (16, 64, 4), (32, 64, 4)),
)


def fitting_warps(warps: int, block_m: int, block_n: int, block_k: int, dtype: torch.dtype, gpu: Gpu) -> int:
    """How many of a tile's warps a program can have: x and weights, [warps, block_m + block_n, block_k], must fit.

    One row stays in registers. Only float32 in 99 KiB takes fewer than TILES says, for 5 to 8 rows, 2,048 features.
    """
    warp_bytes = (block_m + block_n) * block_k * dtype.itemsize
    while block_m > 1 and warps > 1 and warps * warp_bytes > gpu.shared_memory:
        warps //= 2
    return warps


HOPPER_ROWS = 64  # up to which Hopper's own kernel, kernels/linear_hopper.py, can be the fastest


def hopper_rows_pay(rows: int, nbytes: int, is_normed: bool) -> bool:
    """Whether it is, for so many rows, normalised or not, and bytes of a weight.

    16 rows on one H200, its time in us; in brackets the library's with the norm and the gate apart, and 8 rows by the
    kernel for few. Qwen3-0.6B: q, k and v 5.7 (6.4, 5.6), o 4.0 (5.9, 3.8), gates and ups 6.3 (7.9, 6.3), downs 5.8
    (6.9, 4.8). Qwen3-8B: o 10.4 (12.9, 11.7), downs 26.5 (29.4, 27.5). Norms hold its multiplications up: 8B's q, k
    and v take 23.4 (18.3), its gates and ups 61.4 (53.6). 64 rows are alike. From 96 rows on the library is faster:
    8B's gates and ups of 128 take it 57.8, and this kernel with twice the rows a tile 63.5.
    """
    is_large = nbytes >= LARGE_WEIGHT_BYTES
    return (SMALL_BATCH_OF_LARGE if is_large else SMALL_BATCH) < rows <= HOPPER_ROWS and not (is_large and is_normed)


def hopper_rows_tile(num_results: int, size: int, matrices: int, is_large: bool) -> tuple[int, int]:
    """Results of a program, each of so many matrices' features, and parts of K on their way at once.

    A large weight wants all of shared memory. Of others programs take half, to leave the rest to the next kernel.
    """
    block_n = 16 if num_results <= 2048 else 32 if num_results <= 4096 or matrices == 2 else 64
    stage_bytes = (HOPPER_ROWS + matrices * block_n) * 128 * 2
    return block_n, min(-(-size // 128), (200 if is_large else 100) * 1024 // stage_bytes)


class QuantizedTile(NamedTuple):
    """Features of a program, columns of a part of K, which have one scale, parts at a time, and warps."""

    block_n: int
    block_k: int
    parts: int
    warps: int


def quantized_tile(size: int, scale_columns: int) -> QuantizedTile:
    """For few rows of so many elements and a weight in few bits, with a scale for so many columns of a row."""
    block_k = scale_block(size, scale_columns)
    parts = min(8, triton.next_power_of_2(-(-size // block_k)))
    return QuantizedTile(16, block_k, parts, min(4, parts))


class RowTile(NamedTuple):
    """Features that a program multiplies at once, runs of 16 bytes of each, warps, and how often it does so."""

    block_n: int
    runs: int
    warps: int
    blocks: int = 1


def row_tile(num_features: int, row_bytes: int, bits: int) -> RowTile:
    """For one row, and a weight in few bits: its features, and the bytes of a row of it.

    One request on Qwen3-8B, a token in us, with one product's tile changed: e4m3 2,482, with gates and ups as q, k and
    v 2,523, with downs in half as many runs 2,562; 4 bits 1,941, with gates and ups in eight blocks 2,019.
    """
    runs = triton.next_power_of_2(triton.cdiv(row_bytes, 16))
    if num_features > 8192 and runs <= 256:
        return RowTile(8, runs, max(1, runs // 64), 16 // bits)
    if num_features <= 2048:
        block_n, most_runs = 4 if num_features <= 1024 else 8, 256
    elif bits == 8 and row_bytes <= 4096:
        block_n, most_runs = 16 if num_features <= 4096 and runs <= 64 else 8, 64
    else:
        block_n, most_runs = 8, 128
    blocks = 2 if bits == 4 and num_features > 4096 and runs <= most_runs else 1
    runs = min(runs, most_runs)
    return RowTile(block_n, runs, max(1, runs // 32), blocks)


class ProductsTile(NamedTuple):
    """Rows, features and columns of K that a program multiplies at once; tiles on their way, and warps."""

    block_m: int
    block_n: int
    block_k: int
    stages: int
    warps: int


def products_tile(rows: int, size: int, scale_columns: int) -> ProductsTile:
    """For many rows."""
    block_m = min(64, max(16, triton.next_power_of_2(rows)))
    return ProductsTile(block_m, 64 if rows <= 64 else 128, scale_block(size, scale_columns), 3, 4)


def scale_block(size: int, scale_columns: int) -> int:
    """Columns of which a tile has one scale: a power of two that divides `scale_columns`, if not all have the same."""
    return min(128, triton.next_power_of_2(size) if scale_columns >= size else scale_columns)


# ---- attention, kernels/paged_attention.py -------------------------------------------------------------------------

ATTENTION_WARPS = 4

# Of a thread, for decodes of an FP8 cache with wide tiles. The compiler would take 180, with which two programs run on
# an SM of Hopper, not three.
FP8_DECODE_REGISTERS = 168


class AttentionTiles(NamedTuple):
    """Of keys and values: tokens of a tile, and tiles on their way from memory at once, in stages of the pipeline."""

    block_n: int
    stages: int


def attention_tiles(
    dim: int, block_size: int, dtype: torch.dtype, gpu: Gpu, is_wide: bool, is_fp8: bool = False
) -> AttentionTiles:
    """For heads of `dim` elements in pages of `block_size` tokens; wide where a GPU has much to read.

    A tile of K is 16 KiB, or shared memory would not hold the pipeline, whose depth it limits too: an indirect load
    takes two stages a tile. Wide tiles and a short pipeline read an H200's memory up to 5% faster, given much work.
    A decode program takes 36 to 84 KiB, one of prefill up to 129. With 128 KiB or less they take 20 to 50 and 70.
    Keys and values in FP8, multiplied in `dtype`, have twice as many tiles on their way, for the same bytes.
    """
    buffers = 2 if is_fp8 else 1  # for each that other data types have
    padded_dim = max(16, triton.next_power_of_2(dim))
    block_n = min(64, max(16, 16 * 1024 // (padded_dim * dtype.itemsize)))
    if gpu.shared_memory <= 128 * 1024:
        return AttentionTiles(block_n, stages=1 + 2 * buffers)
    if is_wide and 2 * block_n <= block_size:
        return AttentionTiles(2 * block_n, stages=1 + 2 * buffers)
    return AttentionTiles(block_n, stages=1 + 4 * buffers)


def prefill_rows(dtype: torch.dtype, dim: int, is_fp8: bool) -> int:
    """Rows, that is (token, query head) pairs, of a prefill program.

    D 128: 250 TFLOP/s for 28 prompts of 100 to 1,024 tokens (FlashAttention-2: 200), 430 for one of 8,192 (280). Tiles
    of 128 x 128 on 8 warps reach 475 there, but 210 on the short ones. Float32 is multiplied without tensor cores.
    With FP8 of up to 64 dimensions, Triton 3.6 makes wrong products of as many rows as Hopper's warp groups multiply.
    """
    if dtype == torch.float32:
        return 16
    return 32 if is_fp8 and dim <= 64 else 64


# Tokens of a step from which on Hopper's own prefill pays. 16 heads, 8 KV heads, D 128, in TFLOP/s, the other one in
# brackets: 32 prompts of 1,024 338 (292), 8 of 4,096 582 (406), 2 of 16,384 653 (413), 16,384 tokens behind as many
# 615 (410), 28 of 100 to 1,000 224 (222). In us, with 32 heads, alone, behind 1,024, 4,096 and 16,384 tokens: 256
# tokens 10 (8), 21 (21), 54 (61), 192 (219); 512 tokens 13 (14), 25 (33), 60 (90), 210 (318); four prompts of 100 to
# 400 28 (22), 64 (68), 174 (179), 613 (630). Without a graph its launch takes the host 70 us, the other one's 30.
HOPPER_PREFILL_TOKENS = 512


def decode_programs(units: int, gpu: Gpu) -> tuple[int, int]:
    """How many programs take big and small shares of `units` (row, KV head) pairs.

    Three for an SM of Hopper, two for others: as many as run at once by their shared memory, with wide tiles. With few
    units a program for each SM suffices, as a unit in more than 16 parts costs more to merge than it gains. Small
    shares pay from one unit an SM on. With the benchmark's lengths 246 rows read at 4.24 TB/s, 119 at 4.20, 77 at
    4.13; with 30,000 tokens each 2 rows at 3.7, 8 at 4.37, 16 at 4.5, by two programs for an SM 3.0, 3.5 and 3.5.
    """
    if 16 * units <= gpu.num_sms:
        return gpu.num_sms, 0
    num_programs = (3 if gpu.shared_memory > 200 * 1024 else 2) * gpu.num_sms
    return num_programs, num_programs if units > gpu.num_sms else 0


# Of `rope_decode`: twice as many as of the others, for with few rows all of a program is the wait for its end. One
# request of 128 tokens on Qwen3-0.6B 579 us a token, with four warps 628; on 8B in FP8 2,346, with four 2,398.
ROPE_DECODE_WARPS = 8

# Fewer than others have, so that an SM holds two programs. A step of one request on Qwen3-0.6B behind 128 / 900 /
# 2,000 / 16,000 tokens, in us: 557 / 594 / 661 / 1,118; with five stages 567 / 592 / 663 / 1,104; with half as many
# parts 562 / 601 / 666 / 1,396; by the two kernels that it stands for 601 / 630 / 679 / 1,134.
ROPE_DECODE_STAGES = 3

# Parts of a (row, KV head) pair from which on `rope_decode` is the faster. A step in us, without / with it: a request
# of 128 tokens on Qwen3-0.6B 612 / 581, two 726 / 680, four 779 / 769, but four of 2,000 tokens 1,042 / 1,089.
MIN_ROPE_DECODE_SPLITS = 16


def rope_decode_splits(units: int, gpu: Gpu) -> int:
    """Into how many parts `rope_decode` cuts the keys of each of so many (row, KV head) pairs: a power of two."""
    return min(32, 2 ** (max(1, 2 * gpu.num_sms // units).bit_length() - 1))


# ---- mixtures of experts, kernels/routing.py, experts.py and few_experts.py -----------------------------------------

# The shape of Qwen3-30B-A3B on one H200: 128 experts of 768 x 2048, of which a token has 8.

# Tokens up to which each (token, expert) pair reads the weights by itself. One token: 15.6 us for gates and ups
# and 8.8 for downs, 3.2 and 2.9 TB/s of what is needed; four tokens 45.8 and 24.7, 4.1 and 3.8 TB/s.
FEW_TOKENS = 4
ROUTED_TOKENS = 4  # that one program routes


class ExpertsTile(NamedTuple):
    """Rows, features and elements of a row that a program multiplies at once; tiles on their way, and warps."""

    block_m: int
    block_n: int
    block_k: int
    stages: int
    warps: int


def experts_tile(mean_rows: float, dtype: torch.dtype) -> ExpertsTile:
    """For experts that have so many rows on average.

    8 tokens: gates and ups at 4.3 TB/s, downs at 4.0; 131 tokens 4.4 and 4.0; 256 tokens 4.25 and 3.85. 8,192 tokens
    442 and 335 TFLOP/s. A program takes up to 96 KiB of shared memory.
    """
    if dtype == torch.float32:
        return ExpertsTile(16, 32, 32, 2, 4)
    if mean_rows <= 12:
        return ExpertsTile(16, 64, 128, 3, 4)
    if mean_rows <= 24:
        return ExpertsTile(32, 64, 128, 3, 4)
    if mean_rows < 64:
        return ExpertsTile(64, 128, 64, 3, 4)
    return ExpertsTile(128, 128, 64, 3, 8)


def quantized_experts_tile(mean_rows: float, size: int, scale_columns: int) -> ExpertsTile:
    """For rows and weights in 8 bits, with a scale for so many columns of a row.

    131 tokens: gates and ups in 107 us, downs in 61, with the rounding of their rows; 256 tokens 115 and 68; 1,024
    tokens 165 and 113; 8,192 tokens 885 and 660. A program takes up to 99 KiB of shared memory.
    """
    block_k = scale_block(size, scale_columns)
    if mean_rows <= 12:
        return ExpertsTile(16, 128, block_k, 3, 4)
    if mean_rows <= 24:
        return ExpertsTile(32, 128, block_k, 4, 4)
    return ExpertsTile(64, 128, block_k, 4, 4)


class FewExpertsTile(NamedTuple):
    """Features that a program computes, elements of a part of a row at a time, parts of a row, and warps."""

    block_n: int
    block_k: int
    splits: int
    warps: int


def few_experts_tile(size: int, slots: int) -> FewExpertsTile:
    """For rows of some size, of which a program multiplies `slots`."""
    num_parts = 4 if slots == 1 else 8
    splits = max(1, num_parts // triton.next_power_of_2(slots))
    block_k = min(128, max(16, triton.next_power_of_2(-(-size // splits))))
    return FewExpertsTile(8, block_k, splits, num_parts)


def few_quantized_experts_tile(slots: int) -> FewExpertsTile:
    """For weights in 8 bits. Chosen by counting instructions too: 4.3 a code of gates and ups, 4.5 of downs."""
    if slots == 1:
        return FewExpertsTile(8, 512, 1, 2)
    return FewExpertsTile(8, 512 if slots <= 4 else 256, 1, 8)


# ---- sums over ranks, parallel/peer_memory.py ----------------------------------------------------------------------

# Rows whose parts of a sum the kernel that makes them sends, where Hopper's own does. Qwen3-8B on two H200s: a step of
# 16 rows in 3.02 ms, in 3.09 as the next kernel sends what the library has made; of 48 rows in 3.81, and 3.49.
HOPPER_PACKET_ROWS = 16

# Sums of more rows are made in shares. A step of Qwen3-8B on two H200s, in parts / in shares: 1,024 rows 13.0 / 14.3
# ms, 2,048 rows 24.9 / 25.6, 4,096 rows 48.0 / 48.4, 16,200 rows 167 / 162. With more ranks, parts are more traffic.
MAX_PART_ROWS = 2048
