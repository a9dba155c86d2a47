"""Every kernel compiles for GPUs that are not here, and takes no more shared memory than they have.

The public functions launch their kernels as ever, on tensors without memory; in place of each launch the kernel is
compiled, down to machine code, with the very arguments and options of the launch.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import nanovllm.kernels
import nanovllm.parallel
from nanovllm.kernels import HAS_TRITON, quantized_weight, tuning
from nanovllm.kernels import rms_norm as rms_norm_module
from nanovllm.kernels.activation import GATES
from nanovllm.kernels.adjust_logits import LogitTables, adjust_logits
from nanovllm.kernels.compile_ahead import compiling_together
from nanovllm.kernels.decode_rows import advance_rows, store_tokens
from nanovllm.kernels.experts import down_experts, gate_up_experts
from nanovllm.kernels.linear import linear
from nanovllm.kernels.logprobs import top_logprobs
from nanovllm.kernels.ngrams import propose_ngrams
from nanovllm.kernels.paged_attention import compiled_for, paged_decode, paged_prefill
from nanovllm.kernels.quantized_products import scale_products
from nanovllm.kernels.quantized_weight import QuantizedWeight
from nanovllm.kernels.rms_norm import rms_norm
from nanovllm.kernels.rope_decode import rope_decode
from nanovllm.kernels.routing import route
from nanovllm.kernels.sampling import draw, filter_thresholds
from nanovllm.kernels.store_kvcache import rope_store_kvcache
from nanovllm.kernels.tuning import HOPPER_PREFILL_TOKENS
from nanovllm.kernels.verify_rows import lay_out_drafts, store_verified
from nanovllm.parallel.all_reduce import Peers, add_sum, max_over_ranks, send_linear, send_part

if not HAS_TRITON or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs triton's compiler", allow_module_level=True)

from triton import runtime
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction, MockTensor

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")

KIB = 1024
GPUS = {  # by compute capability
    80: tuning.Gpu(num_sms=108, shared_memory=163 * KIB),  # A100
    89: tuning.Gpu(num_sms=58, shared_memory=99 * KIB),  # L4; an RTX 4090 has 128 SMs
    90: tuning.Gpu(num_sms=132, shared_memory=227 * KIB, is_hopper=True),  # H200
}
EARLY_START = 90  # the capability from which on a kernel can start before the one ahead of it ends
ADDRESS = 2**40  # too large for 32 bits, as those of GPUs are
MAX_MODEL_LEN, VOCAB_SIZE, HIDDEN_SIZE = 40960, 151936, 4096
BF16, F32, I32, I64 = torch.bfloat16, torch.float32, torch.int32, torch.int64
E4M3 = torch.float8_e4m3fn


class Driver:
    """What triton asks about the GPU; the device's number is its capability, so that each has a cache of its own."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0


def without_memory(argument: Any) -> Any:
    """Tensors as triton knows those that only have a type."""
    if isinstance(argument, torch.Tensor):
        return MockTensor(argument.dtype)
    return tuple(map(without_memory, argument)) if isinstance(argument, tuple) else argument


@pytest.fixture
def launch_on(monkeypatch) -> Iterator[Callable[[int, Callable], None]]:
    """Names a GPU's capability, and what is called in place of each launch on it."""

    def start(capability: int, launch: Callable) -> None:
        gpu = GPUS[capability]
        properties = types.SimpleNamespace(
            multi_processor_count=gpu.num_sms, shared_memory_per_block_optin=gpu.shared_memory, major=capability // 10
        )
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(runtime.driver, "_active", Driver(capability))
        monkeypatch.setattr(quantized_weight, "has_e4m3", lambda device: capability >= 89)
        monkeypatch.setattr(JITFunction, "run", launch)
        # So that any tensor goes to the kernels.
        monkeypatch.setattr(nanovllm.kernels, "INTERPRETED", True)

    caches = tuning.gpu_of, compiled_for
    for cache in caches:
        cache.cache_clear()
    yield start
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def compile_for(launch_on) -> Callable[[int], list[tuple[str, int]]]:
    """Names a capability; gives a list that grows by the name and the shared memory of each kernel launched then."""

    def start(capability: int) -> list[tuple[str, int]]:
        compiled: list[tuple[str, int]] = []
        compile_kernel = JITFunction.run

        def compile_launch(self, *args, grid, warmup, **options):
            if "launch_pdl" in options:
                options |= dict.fromkeys(("PDL", "launch_pdl"), capability >= EARLY_START)
            kernel = compile_kernel(self, *map(without_memory, args), grid=grid, warmup=True, **options)
            assert kernel.asm["cubin"]
            compiled.append((self.__name__, kernel.metadata.shared))

        launch_on(capability, compile_launch)
        return compiled

    return start


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


# What an engine launches, each for one data type


def launch_attention(
    dtype: torch.dtype,
    dim: int,
    block_size: int,
    heads: int = 16,
    kv_heads: int = 8,
    cache_dtype: torch.dtype | None = None,
    **scores: float,
) -> None:
    """Decodes of one row, of some and of many, which takes wide tiles; prefills of few tokens and of many."""
    k_cache, v_cache = empty(2, 64, block_size, kv_heads, dim, dtype=cache_dtype or dtype)
    for rows in (1, 12, 256):
        q = empty(rows, heads, dim, dtype=dtype)
        tables = empty(rows, MAX_MODEL_LEN // block_size, dtype=I32)
        lens, semaphores = empty(rows, dtype=I32), empty(rows * kv_heads, dtype=I32)
        paged_decode(q, k_cache, v_cache, tables, lens, semaphores, 0.1, **scores)
    for num_tokens in (rows, HOPPER_PREFILL_TOKENS):
        q = empty(num_tokens, heads, dim, dtype=dtype)
        paged_prefill(q, k_cache, v_cache, tables, lens, empty(rows + 1, dtype=I32), 0.1, **scores)


def launch_rope(
    dtype: torch.dtype,
    dim: int,
    heads: int = 16,
    kv_heads: int = 8,
    cache_dtype: torch.dtype | None = None,
    **scores: float,
) -> None:
    """Of whole heads, and of a part of them; of several rows, and of one with its attention."""
    norm = empty(dim, dtype=dtype)
    caches = empty(2, 64, 256, kv_heads, dim, dtype=cache_dtype or dtype)
    tables = empty(1, MAX_MODEL_LEN // 256, dtype=I32)
    qkv, ints = empty(4, (heads + 2 * kv_heads) * dim, dtype=dtype), empty(4, dtype=I32)
    for rotary_dim in (dim, dim // 4 * 2):
        cos_sin = empty(MAX_MODEL_LEN, rotary_dim, dtype=F32)
        rope_store_kvcache(qkv, cos_sin, ints, ints, *caches, norm, norm, 1e-6)
        rope_decode(qkv[:1], cos_sin, ints, ints, *caches, norm, norm, 1e-6, tables, ints, ints, 0.1, **scores)


def launch_linear(dtype: torch.dtype, rows: int) -> None:
    """A normalised product through a gate, onto a residual, with the tiles of every number of features."""
    norm = empty(HIDDEN_SIZE, dtype=dtype)
    for features in (2048, 4096, 8192, 24576):
        x, weight = empty(rows, HIDDEN_SIZE, dtype=dtype), empty(features, HIDDEN_SIZE, dtype=dtype)
        for gate in GATES:
            linear(x, weight, None, norm, 1e-6, residual=empty(rows, features // 2, dtype=dtype), gate=gate)


def launch_some_rows(dtype: torch.dtype) -> None:
    """Hopper's own products: of small weights with a norm, of large ones without, with few features and many."""
    for features, size in ((1024, 3072), (6144, 1024), (4096, 12288), (24576, 4096)):
        x, weight = empty(24, size, dtype=dtype), empty(features, size, dtype=dtype)
        norm = empty(size, dtype=dtype) if weight.nbytes < tuning.LARGE_WEIGHT_BYTES else None
        for gate in (None, *GATES):
            width = features // 2 if gate else features
            linear(x, weight, empty(features, dtype=dtype), norm, 1e-6, empty(24, width, dtype=dtype), gate)


def quantized_weights(kind: str, n: int) -> list[QuantizedWeight]:
    """n rows: e4m3 with scales of rows and of blocks; int8 of rows; 4 bits without zeros and with."""
    size = HIDDEN_SIZE
    by_rows, by_blocks = empty(n, 1, dtype=F32), empty(n // 128, size // 128, dtype=F32)
    by_groups, zeros = empty(n, size // 128, dtype=torch.float16), empty(n, size // 128, dtype=torch.uint8)
    e4m3, int8 = (empty(n, size, dtype=dtype) for dtype in (torch.float8_e4m3fn, torch.int8))
    int4 = empty(n, size // 2, dtype=torch.uint8)
    return {
        "fp8": [
            QuantizedWeight(e4m3, by_rows, (1, size), rounds_input=True),
            QuantizedWeight(e4m3, by_blocks, (128, 128), rounds_input=True),
        ],
        "int8": [QuantizedWeight(int8, by_rows, (1, size), rounds_input=True)],
        "int4": [QuantizedWeight(int4, by_groups, (1, 128)), QuantizedWeight(int4, by_groups, (1, 128), zeros=zeros)],
    }[kind]


def launch_quantized(dtype: torch.dtype, kind: str) -> None:
    """Products for few, some and many rows, and a part of a sum over ranks."""
    norm = empty(HIDDEN_SIZE, dtype=dtype)
    for weight in quantized_weights(kind, 16 * HIDDEN_SIZE):
        linear(empty(1, HIDDEN_SIZE, dtype=dtype), weight, None, norm, 1e-6, gate="silu")
    for weight in quantized_weights(kind, HIDDEN_SIZE):
        for rows in (1, 4, tuning.SMALL_BATCH + 1, 256):
            linear(empty(rows, HIDDEN_SIZE, dtype=dtype), weight, None, norm, 1e-6, gate="silu")
        peers = Peers([empty(2**24, dtype=torch.uint8)] * 2, "packets", (ADDRESS,) * 2, 1, 256, empty(1, dtype=I32))
        send_linear(empty(4, HIDDEN_SIZE, dtype=dtype), weight, None, peers)


def launch_scaling(dtype: torch.dtype) -> None:
    """What follows the library's products of codes, which are only made on a GPU."""
    rows, columns = empty(1, 4, dtype=F32), empty(2 * HIDDEN_SIZE, 1, dtype=F32)
    products, y = empty(4, 2 * HIDDEN_SIZE, dtype=dtype), empty(4, HIDDEN_SIZE, dtype=dtype)
    scale_products(products, rows, columns, None, "silu", y, is_added=True)


def launch_rows(dtype: torch.dtype) -> None:
    """What treats a batch row by row: norm, activation, sampling, the decode batch on the device."""
    x = empty(4, HIDDEN_SIZE, dtype=dtype)
    rms_norm(x, empty(HIDDEN_SIZE, dtype=dtype), 1e-6)
    rms_norm(x, empty(HIDDEN_SIZE, dtype=F32), 1e-6, residual=empty(4, HIDDEN_SIZE, dtype=dtype))
    for gate_and_mul in GATES.values():
        gate_and_mul(empty(4, 2 * HIDDEN_SIZE, dtype=dtype))
    logits, reals, longs = empty(4, VOCAB_SIZE, dtype=dtype), empty(4, dtype=F32), empty(4, dtype=I64)
    low = filter_thresholds(logits, longs, reals, longs, reals, reals)
    packed = draw(logits, longs, reals, longs, longs, 0, low)
    advance_rows(longs, longs, empty(4, dtype=I32), empty(4, 160, dtype=I32), 256)
    store_tokens(packed, longs, longs, empty(4, 4, dtype=I64), empty(1, dtype=I64))
    launch_drafts(num_drafts=0)
    launch_drafts(num_drafts=5)


def launch_drafts(num_drafts: int) -> None:
    """What a step does with so many drafts of each row, of five that there may be."""
    longs, ints, drafts = empty(4, dtype=I64), empty(4, dtype=I32), empty(4, 5, dtype=I32)
    history, ring, count = empty(4, MAX_MODEL_LEN, dtype=I32), empty(4, 4, 9, dtype=I64), empty(1, dtype=I64)
    if num_drafts:
        lay_out_drafts(longs, longs, drafts, ints, empty(4, 160, dtype=I32), 256, num_drafts, MAX_MODEL_LEN)
    packed = empty(4 * (1 + num_drafts), dtype=I64)
    store_verified(packed, longs, drafts, ints, history, longs, ints, ring, count, MAX_MODEL_LEN)
    propose_ngrams(longs, history, ints, drafts, ints, ring, count, 2, 5, MAX_MODEL_LEN)


def launch_adjustments(dtype: torch.dtype) -> None:
    """What draws from adjusted logits, with each set of tables, and tells logprobs, of one token and of several."""
    logits, longs = empty(4, VOCAB_SIZE, dtype=dtype), empty(4, dtype=I64)
    tokens, bias = empty(4, VOCAB_SIZE, dtype=I32), empty(4, VOCAB_SIZE, dtype=F32)
    mask = empty(4, VOCAB_SIZE // 32, dtype=I32)
    for tables in ((tokens,), (tokens, bias), (tokens, None, mask), (tokens, bias, mask)):
        adjust_logits(
            logits, longs, empty(4, dtype=I32), empty(4, 4, dtype=I64), empty(6, 4, dtype=F32), LogitTables(*tables)
        )
    for num_top in (0, 1, 20):
        top_logprobs(logits, longs, num_top)


def launch_experts(dtype: torch.dtype) -> None:
    """A router and its experts, for so many tokens that each kind of tile comes."""
    for num_tokens in (1, 8, 256, 512, 4096):
        routing = route(empty(num_tokens, 128, dtype=dtype), 8, True, empty(128, dtype=I32))
        x, residual = (empty(num_tokens, 2048, dtype=dtype) for _ in range(2))
        h = gate_up_experts(x, empty(128, 1536, 2048, dtype=dtype), routing)
        down_experts(h, empty(128, 2048, 768, dtype=dtype), routing, residual)


def in_8_bits(num_experts: int, num_features: int, size: int, is_per_row: bool) -> QuantizedWeight:
    height, width = (1, size) if is_per_row else (128, 128)
    scales = empty(num_experts, num_features // height, size // width, dtype=F32)
    return QuantizedWeight(empty(num_experts, num_features, size, dtype=E4M3), scales, (height, width))


def launch_experts_in_8_bits(dtype: torch.dtype, is_per_row: bool) -> None:
    """The same with scales of rows or of blocks."""
    for num_tokens in (1, 8, 256, 512, 4096):
        routing = route(empty(num_tokens, 128, dtype=dtype), 8, True, empty(128, dtype=I32))
        x, residual = (empty(num_tokens, 2048, dtype=dtype) for _ in range(2))
        norm = empty(2048, dtype=dtype) if num_tokens == 1 else None
        h = gate_up_experts(x, in_8_bits(128, 1536, 2048, is_per_row), routing, norm, 1e-6)
        down_experts(h, in_8_bits(128, 2048, 768, is_per_row), routing, residual)


def launch_wide_experts_in_8_bits(dtype: torch.dtype, is_per_row: bool) -> None:
    """As wide as Mixtral's: a program reads their rows in several parts."""
    routing = route(empty(1, 8, dtype=dtype), 2, True, empty(8, dtype=I32))
    h = gate_up_experts(empty(1, 4096, dtype=dtype), in_8_bits(8, 28672, 4096, is_per_row), routing)
    down_experts(h, in_8_bits(8, 4096, 14336, is_per_row), routing)


def launch_sums(dtype: torch.dtype, ranks: int) -> None:
    """Sums over ranks in each of their forms."""
    buffers = [empty(2**24, dtype=torch.uint8)] * ranks
    x, norm = empty(4, HIDDEN_SIZE, dtype=dtype), empty(HIDDEN_SIZE, dtype=dtype)
    for form in ("packets", "parts", "shares"):
        peers = Peers(buffers, form, (ADDRESS,) * ranks, ranks - 1, 256, empty(1, dtype=I32))
        if form == "packets":
            for rows in (4, tuning.HOPPER_ROWS):
                send_linear(
                    empty(rows, HIDDEN_SIZE, dtype=dtype), empty(HIDDEN_SIZE, HIDDEN_SIZE, dtype=dtype), None, peers
                )
            send_part(x, peers)
        add_sum(empty(4 * ranks, HIDDEN_SIZE, dtype=dtype), norm, 1e-6, peers)
    max_over_ranks(empty(4, dtype=I64), peers)


def assert_fits(compiled: list[tuple[str, int]], capability: int) -> None:
    assert compiled
    assert not [kernel for kernel in compiled if kernel[1] > GPUS[capability].shared_memory]


def mark_slow(parameters: list[tuple], but: list[tuple]) -> list[Any]:
    """All but some that stand for the others."""
    return [pytest.param(*values, marks=() if values in but else pytest.mark.slow) for values in parameters]


ATTENTION = [
    (capability, dtype, dim, block_size)
    for capability in GPUS
    for dtype in (BF16, F32)
    for dim in (64, 128, 256)
    for block_size in (16, 256)
]
OTHERS = [(capability, dtype) for capability in GPUS for dtype in (BF16, F32)]
EXPERTS_IN_8_BITS = [  # which the others do not have
    (launch, capability, dtype, is_per_row)
    for launch in (launch_experts_in_8_bits, launch_wide_experts_in_8_bits)
    for capability in (89, 90)
    for dtype in (BF16, F32)
    for is_per_row in (False, True)
]


@pytest.mark.parametrize(
    ("capability", "dtype", "dim", "block_size"),
    mark_slow(ATTENTION, but=[(80, BF16, 128, 256), (89, BF16, 128, 256), (89, F32, 256, 16)]),
)
def test_attention(compile_for, capability, dtype, dim, block_size):
    compiled = compile_for(capability)
    launch_attention(dtype, dim, block_size)
    launch_attention(dtype, dim, block_size, window=4096, soft_cap=50.0)
    launch_rope(dtype, dim)
    assert_fits(compiled, capability)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "dtype", "dim", "block_size"),
    [(89, BF16, 128, 256), (90, BF16, 128, 256), (89, F32, 256, 256), (90, BF16, 64, 16)],
)
def test_attention_of_an_fp8_cache(compile_for, capability, dtype, dim, block_size):
    compiled = compile_for(capability)
    launch_attention(dtype, dim, block_size, cache_dtype=E4M3)
    launch_attention(dtype, dim, block_size, cache_dtype=E4M3, window=4096, soft_cap=50.0)
    launch_rope(dtype, dim, cache_dtype=E4M3)
    assert_fits(compiled, capability)


@pytest.mark.parametrize(("capability", "dtype"), mark_slow(OTHERS, but=[(89, F32)]))
def test_linear(compile_for, capability, dtype):
    compiled = compile_for(capability)
    for rows in (1, 4, tuning.SMALL_BATCH):
        launch_linear(dtype, rows)
    if capability == 90 and dtype != F32:
        launch_some_rows(dtype)
    assert_fits(compiled, capability)


def test_no_e4m3_before_there_is_any(compile_for):
    """Numbers are made of the codes by torch, and multiplied by the library."""
    compiled = compile_for(80)
    launch_quantized(BF16, "fp8")
    assert {name for name, _ in compiled} == {"_rms_norm_kernel", "_gate_and_mul_kernel", "_send_kernel"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fp8", "int8", "int4"])
@pytest.mark.parametrize(("capability", "dtype"), [*((capability, BF16) for capability in GPUS), (89, F32)])
def test_quantised_weights(compile_for, capability, kind, dtype):
    compiled = compile_for(capability)
    launch_quantized(dtype, kind)
    launch_scaling(dtype)
    assert_fits(compiled, capability)


@pytest.mark.parametrize(("capability", "dtype"), mark_slow(OTHERS, but=[(80, BF16), (89, BF16)]))
def test_rows(compile_for, capability, dtype):
    compiled = compile_for(capability)
    launch_rows(dtype)
    assert_fits(compiled, capability)


@pytest.mark.parametrize(("capability", "dtype"), mark_slow(OTHERS, but=[(89, BF16)]))
def test_adjustments(compile_for, capability, dtype):
    compiled = compile_for(capability)
    launch_adjustments(dtype)
    assert_fits(compiled, capability)


@pytest.mark.parametrize(("capability", "dtype"), mark_slow(OTHERS, but=[(89, BF16)]))
def test_experts(compile_for, capability, dtype):
    compiled = compile_for(capability)
    launch_experts(dtype)
    assert_fits(compiled, capability)


@pytest.mark.parametrize(
    ("launch", "capability", "dtype", "is_per_row"),
    mark_slow(EXPERTS_IN_8_BITS, but=[(launch_experts_in_8_bits, 89, BF16, False)]),
)
def test_experts_in_8_bits(compile_for, launch, capability, dtype, is_per_row):
    compiled = compile_for(capability)
    launch(dtype, is_per_row)
    assert_fits(compiled, capability)


@pytest.mark.parametrize(("capability", "dtype"), mark_slow(OTHERS, but=[(89, BF16)]))
def test_sums_over_ranks(compile_for, capability, dtype):
    compiled = compile_for(capability)
    for ranks in (2, 8):
        launch_sums(dtype, ranks)
    assert_fits(compiled, capability)


def test_no_kernel_is_left_out(launch_on):
    """The functions above launch every kernel there is."""
    kernels, launched = set(), set()
    for package in (nanovllm.kernels, nanovllm.parallel):
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            values = vars(importlib.import_module(module.name)).values()
            kernels |= {value.__name__ for value in values if isinstance(value, JITFunction)}
    launch_on(90, lambda self, *args, **options: launched.add(self.__name__))
    launch_attention(BF16, 128, 256)
    launch_rope(BF16, 128)
    launch_linear(BF16, 1)
    launch_rows(BF16)
    launch_adjustments(BF16)
    launch_experts(BF16)
    launch_sums(BF16, 2)
    for kind in ("fp8", "int8", "int4"):
        launch_quantized(BF16, kind)
    launch_scaling(BF16)
    assert launched == {name for name in kernels if name.endswith("_kernel")}


def test_an_h200_gets_what_was_measured_on_it():
    def tiles(*args, is_wide, is_fp8=False):
        return tuple(tuning.attention_tiles(*args, GPUS[90], is_wide, is_fp8))

    assert tiles(128, 256, BF16, is_wide=True) == (128, 3)
    assert tiles(128, 256, BF16, is_wide=False) == (64, 5)
    assert tiles(128, 64, BF16, is_wide=True) == (64, 5)  # a wide tile would not lie within a page
    assert tiles(256, 256, F32, is_wide=False) == (16, 5)
    assert tiles(128, 256, BF16, is_wide=True, is_fp8=True) == (128, 5)  # as many bytes on their way
    assert [tuning.decode_programs(units, GPUS[90]) for units in (8, 9, 132, 133)] == [
        (132, 0),
        (396, 0),
        (396, 0),
        (396, 396),
    ]


@pytest.mark.parametrize("capability", GPUS)
def test_warps_are_as_measured_but_for_float32_in_little_memory(capability):
    for block_m, tiles in zip((1, 4, 8), tuning.TILES, strict=True):
        for tile in tiles:
            block_n, block_k, warps = tile
            for dtype in (BF16, F32):
                fitting = tuning.fitting_warps(warps, block_m, block_n, block_k, dtype, GPUS[capability])
                is_large = (capability, dtype, block_m, tile) == (89, F32, 8, tuning.TILES[2][0])
                assert fitting == (warps // 2 if is_large else warps)


def test_the_interpreter_sees_a_gpu_of_hoppers_kind(monkeypatch):
    monkeypatch.setattr(tuning, "INTERPRETED", True)
    gpu = tuning.gpu_of.__wrapped__(torch.device("cpu"))
    assert gpu.shared_memory == GPUS[90].shared_memory
    assert tuning.decode_programs(5, gpu) == (12, 12)


def test_kernels_are_compiled_together(launch_on):
    """Each kind of a kernel once, however often it is launched, and none is run; whatever was patched is as before."""
    launch_on(90, JITFunction.run)
    launch, cache = JITFunction.run, rms_norm_module._rms_norm_kernel.device_caches[90][0]
    cache.clear()
    with compiling_together():
        assert JITFunction.run is not launch
        for dtype in (BF16, F32, BF16):
            for rows in (3, 5):
                rms_norm(torch.empty(rows, 64, dtype=dtype), torch.empty(64, dtype=dtype), 1e-6)
    assert JITFunction.run is launch
    assert len(cache) == 2 and all(kernel.asm["cubin"] for kernel in cache.values())


def test_after_an_error_kernels_are_launched_as_before(launch_on):
    launch_on(90, JITFunction.run)
    launch = JITFunction.run
    with pytest.raises(KeyError), compiling_together():
        rms_norm(torch.empty(3, 64, dtype=BF16), torch.empty(64, dtype=torch.complex64), 1e-6)
    assert JITFunction.run is launch
