"""Kernels for weights in few bits equal the plain statements beside them, on a GPU and in Triton's interpreter."""

import math

import pytest
import torch
from interpreter import DEVICE, INTERPRETED, kernel_test, plain_test, run_in_interpreter
from kernel_data import rounded

from nanovllm.kernels import quantized_row
from nanovllm.kernels.dequantize import dequantize
from nanovllm.kernels.linear import launch_linear, linear, linear_torch, takes_few_rows
from nanovllm.kernels.quantized_products import (
    multiplies_blocks,
    multiply_blocks,
    scale_products,
    scale_products_torch,
)
from nanovllm.kernels.quantized_row import takes_row
from nanovllm.kernels.quantized_tiles import multiply_tiles, multiply_tiles_torch
from nanovllm.kernels.quantized_weight import QuantizedWeight, pack_int4, unpack_int4
from nanovllm.kernels.rms_norm import rms_norm_torch
from nanovllm.kernels.round_rows import round_rows, round_rows_torch
from nanovllm.kernels.tuning import RowTile

# Of codes, columns that have one scale (None: all), and whether there are zeros. Blocks have scales of 128 rows too.
FORMS = {
    "e4m3": (torch.float8_e4m3fn, None, False),
    "e4m3 blocks": (torch.float8_e4m3fn, 128, False),
    "int8": (torch.int8, None, False),
    "int8 groups": (torch.int8, 64, True),
    "int4": (torch.uint8, None, False),
    "int4 groups of 32": (torch.uint8, 32, True),
    "int4 groups of 128": (torch.uint8, 128, False),
}
DTYPES = [torch.float32, torch.float16] if INTERPRETED else [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


def random_weight(form: str, n: int, k: int, **options: bool) -> QuantizedWeight:
    """Of numbers with std about 1 / sqrt(k)."""
    dtype, group, has_zeros = FORMS[form]
    block = (128 if "blocks" in form else 1), group or k
    scales_shape = -(-n // block[0]), -(-k // block[1])
    zeros = None
    if dtype == torch.float8_e4m3fn:
        codes, std = (torch.randn(n, k, device=DEVICE) * 100).clamp(-448, 448).to(dtype), 100
    elif dtype == torch.int8:
        codes, std = torch.randint(-128, 128, (n, k), device=DEVICE, dtype=dtype), 74
    else:
        codes, std = pack_int4(torch.randint(0, 16, (n, k), device=DEVICE, dtype=dtype)), 4.6
    if has_zeros:
        low, high = (-20, 20) if dtype == torch.int8 else (0, 16)
        zeros = torch.randint(low, high, scales_shape, device=DEVICE, dtype=dtype)
    scales = (torch.rand(scales_shape, device=DEVICE) + 0.5) / std / k**0.5
    return QuantizedWeight(codes, scales.half() if dtype == torch.uint8 else scales, block, zeros, **options)


def with_gaps(rows: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    """Random rows with NaN between them."""
    base = torch.full((rows, size + 8), math.nan, device=DEVICE, dtype=dtype)
    base[:, :size] = torch.randn(rows, size, device=DEVICE)
    return base[:, :size]


def relative_error(x: torch.Tensor, reference: torch.Tensor) -> float:
    return ((x.double() - reference.double()).norm() / reference.double().norm()).item()


@plain_test
@pytest.mark.slow
def test_in_the_interpreter():
    run_in_interpreter(__file__)


@plain_test
def test_packed_codes_come_back():
    codes = torch.randint(0, 16, (3, 96), dtype=torch.uint8)
    packed = pack_int4(codes)
    assert packed.shape == (3, 48)
    assert torch.equal(unpack_int4(packed), codes)
    assert packed[0, 0] == codes[0, 0] + 16 * codes[0, 16]


@plain_test
def test_numbers_of_codes():
    """Each by its definition, with an order of columns."""
    order = torch.randperm(128)
    for form in FORMS:
        weight = random_weight(form, 130, 128)
        weight = QuantizedWeight(weight.codes, weight.scales, weight.block, weight.zeros, order)
        codes = unpack_int4(weight.codes) if weight.bits == 4 else weight.codes
        numbers = weight.dequantize(torch.float32)
        for row, column in ((0, 0), (129, 127), (128, 5), (64, 64)):
            at = row // weight.block[0], column // weight.block[1]
            default = 8 if weight.bits == 4 else 0
            zero = default if weight.zeros is None else weight.zeros[at].item()
            number = (codes[row, column].float() - zero) * weight.scales[at].float()
            assert numbers[row, order[column]] == number


@kernel_test
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_few_rows(form, dtype):
    """Both kernels for few rows: with norm, gate, residual and bias, features and columns that fill no tile."""
    cases = [(None, None, False, False), ("norm", "silu", True, True), ("norm", "gelu_tanh", False, False)]
    shapes = [(1, 130, 384), (3, 40, 384)] + ([] if INTERPRETED else [(1, 40, 256), (8, 130, 256)])
    for rows, n, k in shapes:
        for normed, gate, added, biased in cases:
            weight = random_weight(form, n, k)
            x = with_gaps(rows, k, dtype)
            norm = torch.rand(k, device=DEVICE).to(dtype) if normed else None
            bias = torch.randn(n, device=DEVICE).to(dtype) if biased else None
            y = with_gaps(rows, n // 2 if gate else n, dtype)
            residual = y.float() if added else None
            numbers = weight.dequantize(torch.float32)
            optional = [None if t is None else t.float() for t in (bias, norm)]
            reference = linear_torch(x.float(), numbers, *optional, 1e-6, residual, gate)
            launch_linear(x, weight, bias, norm, 1e-6, y, gate, added)
            assert relative_error(y, reference) < TOLERANCE[dtype], (rows, n, k, normed, gate)


@kernel_test
@pytest.mark.parametrize("form", ["e4m3", "e4m3 blocks", "int8 groups", "int4 groups of 32"])
def test_a_row_for_several_blocks_of_features(monkeypatch, form):
    """Three in a program, of which the last has one, and not all of that."""
    monkeypatch.setattr(quantized_row, "row_tile", lambda *arguments: RowTile(block_n=8, runs=32, warps=1, blocks=3))
    for normed, gate, added in ((True, "silu", False), (False, None, True)):
        weight = random_weight(form, 50, 384)
        x, norm = torch.randn(1, 384, device=DEVICE).half(), torch.rand(384, device=DEVICE).half() if normed else None
        y = torch.randn(1, 25 if gate else 50, device=DEVICE).half()
        residual = y.float() if added else None
        exact_norm = None if norm is None else norm.float()
        exact = linear_torch(x.float(), weight.dequantize(torch.float32), None, exact_norm, 1e-6, residual, gate)
        launch_linear(x, weight, None, norm, 1e-6, y, gate, added)
        assert relative_error(y, exact) < TOLERANCE[torch.float16]


@kernel_test
def test_a_row_of_any_size():
    """Numbers far from 1, and a row of zeros: products go through float16."""
    for form in ("e4m3", "int8", "int4 groups of 128"):
        weight = random_weight(form, 32, 256)
        numbers = weight.dequantize(torch.float32)
        for scale in (0.0, 1e-3, 3e3) if INTERPRETED else (0.0, 1e-30, 1e-4, 1e6, 1e30):
            x = (torch.randn(1, 256, device=DEVICE) * scale).to(torch.float16 if INTERPRETED else torch.bfloat16)
            assert takes_row(x, weight)
            y = x.new_empty(1, 32)
            launch_linear(x, weight, None, None, 0.0, y, None, False)
            reference = x.float() @ numbers.t()
            if scale == 0:
                assert not y.any()
            else:
                assert relative_error(y, reference) < 1e-2, (form, scale)


@kernel_test
@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("group", [128, 0])
def test_round_rows(kind, group):
    """As its torch function rounds, but for codes between two of which a number lies in the middle."""
    for rows, size, normed, static in ((1, 128, True, False), (5, 300, False, False), (7, 1000, True, True)):
        x = with_gaps(rows, size, torch.float16)
        norm = torch.rand(size, device=DEVICE).half() if normed else None
        input_scale = torch.tensor([0.004], device=DEVICE) if static else None
        arguments = kind, group or size, norm, 1e-6, input_scale
        codes, scales = round_rows(x, *arguments)
        expected_codes, expected_scales = round_rows_torch(x, *arguments)
        torch.testing.assert_close(scales, expected_scales, rtol=1e-5, atol=0)
        spread = expected_scales.t().repeat_interleave(group or size, 1)[:, :size]
        error = relative_error(codes.float() * spread, expected_codes.float() * spread)
        assert error < (0.1 if INTERPRETED else 5e-3)  # the interpreter truncates to e4m3
        assert codes.float().abs().max() == (448 if kind == torch.float8_e4m3fn else 127)


@kernel_test
@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.int8])
def test_rounding_keeps_failures(kind):
    """NaN and infinity are NaN behind it, and other groups what they are: a failed sequence must be seen."""
    x = torch.randn(5, 256, device=DEVICE).half()
    x[1, 130], x[3, 5] = math.nan, -math.inf
    for input_scale in (None, torch.tensor([0.004], device=DEVICE)):
        for round_them in (round_rows, round_rows_torch):
            _, scales = round_them(x, kind, 128, input_scale=input_scale)
            assert scales.isnan().nonzero().tolist() == [[0, 3], [1, 1]]


@kernel_test
@pytest.mark.parametrize("form", ["e4m3", "e4m3 blocks", "int8"])
def test_tiles(form):
    for rows, n, k in ((1, 64, 128), (9, 130, 256), (70, 40, 384)):
        weight = random_weight(form, n, k)
        x = torch.randn(rows, k, device=DEVICE).half()
        codes, scales = round_rows(x, weight.codes.dtype, weight.block[1])
        y = multiply_tiles(codes, scales, weight, torch.float16)
        assert relative_error(y, multiply_tiles_torch(codes, scales, weight, torch.float32)) < 1e-3


@kernel_test
def test_scale_products():
    for gate, biased, added in (
        (None, False, True),
        (None, True, False),
        ("silu", True, False),
        ("silu", False, True),
    ):
        rows, n = 5, 2100
        products = torch.randn(rows, n, device=DEVICE).half()
        x_scales, scales = torch.rand(1, rows, device=DEVICE), torch.rand(n, 1, device=DEVICE)
        bias = torch.randn(n, device=DEVICE).half() if biased else None
        y = with_gaps(rows, n // 2 if gate else n, torch.float16)
        expected = y.clone()
        scale_products_torch(products, x_scales, scales, bias, gate, expected, added)
        scale_products(products, x_scales, scales, bias, gate, y, added)
        torch.testing.assert_close(y, expected, rtol=2e-3, atol=2e-3)


@kernel_test
@pytest.mark.parametrize("form", FORMS)
def test_dequantize(form):
    weight = random_weight(form, 130, 384)
    assert torch.equal(dequantize(weight, torch.float32), weight.dequantize(torch.float32))


@kernel_test
@pytest.mark.parametrize("rows", [1, 2, 20] if INTERPRETED else [1, 2, 8, 9, 64, 300])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_linear(form, rows, dtype):
    """Whichever way is taken: errors at most 1.2 times those of the plain statement, which rounds rows if asked to."""
    rounds = [False, True] if form in ("e4m3", "e4m3 blocks", "int8") else [False]
    for rounds_input in rounds:
        weight = random_weight(form, 256, 384, rounds_input=rounds_input)
        x, norm = torch.randn(rows, 384, device=DEVICE).to(dtype), torch.rand(384, device=DEVICE).to(dtype)
        numbers = weight.dequantize(torch.float32)
        for gate, residual in ((None, torch.randn(rows, 256, device=DEVICE).to(dtype)), ("silu", None)):
            exact_residual = None if residual is None else residual.float()
            exact = linear_torch(x.float(), numbers, None, norm.float(), 1e-6, exact_residual, gate)
            plain_x, plain_norm = x, norm
            if rounds_input:
                normed = rms_norm_torch(x.float(), norm, 1e-6)
                plain_x, plain_norm = rounded(normed, weight.block[1], weight.codes.dtype).to(dtype), None
            added = None if residual is None else residual.clone()
            plain = linear_torch(plain_x, numbers.to(dtype), None, plain_norm, 1e-6, added, gate)
            y = linear(x, weight, None, norm, 1e-6, residual, gate)
            slack = 0.08 if INTERPRETED and rounds_input else 0.0  # the interpreter truncates to e4m3
            assert relative_error(y, exact) <= 1.2 * relative_error(plain, exact) + slack


@kernel_test
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(("form", "size"), [("e4m3", 384), ("e4m3", 200), ("int8", 384), ("int4 groups of 32", 384)])
def test_what_float16_holds_only_once_it_is_normalised(form, size, rows):
    """Before, it times the norm's weight is infinite. Rows of 200 have no kernel for one of them."""
    weight = random_weight(form, 64, size)
    x, norm = torch.randn(rows, size, device=DEVICE).half(), torch.rand(size, device=DEVICE).half()
    x[:, 7], norm[7] = 20000.0, 4.0
    exact = linear_torch(x.float(), weight.dequantize(torch.float32), None, norm.float(), 1e-6)
    assert relative_error(linear(x, weight, None, norm, 1e-6), exact) < TOLERANCE[torch.float16]


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="the library has it for GPUs only")
@pytest.mark.parametrize("rows", [2, 8, 9, 64, 301])
def test_blocks_in_the_library(rows):
    weight = random_weight("e4m3 blocks", 384, 1536)
    if not multiplies_blocks(torch.device("cuda"), weight):
        pytest.skip("needs Hopper and CUDA 12.9")
    codes, scales = round_rows(torch.randn(rows, 1536, device=DEVICE).bfloat16(), torch.float8_e4m3fn, 128)
    y = multiply_blocks(codes, scales, weight)
    assert y.is_contiguous()
    assert relative_error(y, multiply_tiles_torch(codes, scales, weight, torch.float32)) < 4e-3


@kernel_test
def test_columns_in_another_order():
    weight = random_weight("int4 groups of 32", 64, 128)
    weight = QuantizedWeight(
        weight.codes, weight.scales, weight.block, weight.zeros, torch.randperm(128, device=DEVICE)
    )
    for rows in (1, 4, 20):
        x, norm = torch.randn(rows, 128, device=DEVICE).half(), torch.rand(128, device=DEVICE).half()
        exact = linear_torch(x.float(), weight.dequantize(torch.float32), None, norm.float(), 1e-6)
        assert relative_error(linear(x, weight, None, norm, 1e-6), exact) < 3e-3


@kernel_test
def test_which_rows_are_few():
    """Rows that are rounded are few only if there is one: more are faster by the library."""
    x = torch.randn(8, 128, device=DEVICE).half()
    plain, rounding = random_weight("e4m3", 32, 128), random_weight("e4m3", 32, 128, rounds_input=True)
    assert takes_few_rows(x, plain)
    assert not takes_few_rows(x, rounding)
    assert takes_few_rows(x[:1], rounding)
