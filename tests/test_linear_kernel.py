"""The small-batch linear kernel equals the operations that it fuses, on a GPU and in Triton's interpreter.

As in test_kernels.py, `test_in_the_interpreter` runs the kernel tests in a child pytest with TRITON_INTERPRET=1.
"""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from interpreter import DEVICE, INTERPRETED, kernel_test, plain_test, run_in_interpreter

from nanovllm.kernels import HAS_TRITON, quantized_products, quantized_weight
from nanovllm.kernels import linear as linear_module
from nanovllm.kernels.linear import LARGE_WEIGHT_BYTES, linear, takes_few_rows
from nanovllm.kernels.quantized_weight import QuantizedWeight

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Triton's interpreter multiplies the bits of bfloat16 matrices as if they were integers.
DOT_DTYPES = DTYPES[:2] if INTERPRETED else DTYPES
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
COMBINATIONS = list(itertools.product(*[[False, True]] * 3, [None, "silu", "gelu_tanh"]))


def inputs(rows, n, k, dtype, biased, normed, added, gate, device=DEVICE):
    """Arguments of `linear`, x and residual with gaps of NaN between their rows."""

    def randn(*shape):
        return torch.randn(shape, device=device).to(dtype)

    def gaps(rows, size):
        base = torch.full((rows, size + 8), math.nan, device=device, dtype=dtype)
        base[:, :size] = randn(rows, size)
        return base[:, :size]

    return {
        "x": gaps(rows, k),
        "weight": randn(n, k) / k**0.5,
        "bias": randn(n) if biased else None,
        "norm": randn(k) if normed else None,
        "eps": 0.5 if normed else 0.0,
        "residual": gaps(rows, n // 2 if gate else n) if added else None,
        "gate": gate,
    }


def definition(x, weight, bias, norm, eps, residual, gate):
    """`linear` in float64."""
    x, weight, bias, norm, residual = (
        None if tensor is None else tensor.double() for tensor in (x, weight, bias, norm, residual)
    )
    if norm is not None:
        x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * norm
    y = x @ weight.T
    if bias is not None:
        y = y + bias
    if gate is not None:
        gates, ups = y.chunk(2, dim=-1)
        y = (F.silu(gates) if gate == "silu" else F.gelu(gates, approximate="tanh")) * ups
    return y if residual is None else residual + y


def check(arguments):
    expected = definition(**arguments)
    x, residual = arguments["x"], arguments["residual"]
    before = x.clone()
    scale = expected.norm(dim=-1)
    if residual is not None:  # what is added to it may leave next to nothing
        scale = scale.maximum(residual.double().norm(dim=-1))
    y = linear(**arguments)
    assert y.shape == expected.shape and y.dtype == x.dtype
    error = (y.double() - expected).norm(dim=-1) / scale
    assert error.max().item() <= TOLERANCE[x.dtype]  # false for NaN
    assert torch.equal(x, before)
    if residual is not None:
        assert y.data_ptr() == residual.data_ptr()
        assert residual._base[:, -8:].isnan().all()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def any_rows(monkeypatch):
    """The kernel takes any number of rows, and fresh memory holds NaN."""
    monkeypatch.setattr(linear_module, "SMALL_BATCH", 64)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(math.nan))
    if DEVICE == "cpu":
        monkeypatch.setattr(linear_module, "linear_torch", None)


@plain_test
@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
def test_in_the_interpreter():
    run_in_interpreter(__file__)


@plain_test
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("combination", COMBINATIONS)
def test_the_torch_function(combination, dtype):
    check(inputs(5, 36, 52, dtype, *combination, device="cpu"))


@kernel_test
@pytest.mark.parametrize("dtype", DOT_DTYPES)
@pytest.mark.parametrize("combination", COMBINATIONS)
def test_every_combination(any_rows, combination, dtype):
    check(inputs(3, 40, 80, dtype, *combination))
    check(inputs(1, 66, 4100, dtype, *combination))


@kernel_test
@pytest.mark.parametrize("dtype", DOT_DTYPES)
@pytest.mark.parametrize("rows", range(1, 18))
def test_every_number_of_rows(any_rows, rows, dtype):
    check(inputs(rows, 34, 200, dtype, False, True, True, None))


@kernel_test
@pytest.mark.parametrize("dtype", DOT_DTYPES)
@pytest.mark.parametrize("rows", [1, 3])
def test_a_norm_in_float32(any_rows, rows, dtype):
    arguments = inputs(rows, 40, 200, dtype, False, True, False, None)
    check(arguments | {"norm": 1 + torch.randn(200, device=DEVICE) / 1000})


@kernel_test
@pytest.mark.parametrize("gate", [None, "silu"])
@pytest.mark.parametrize("rows", [1, 2, 8, 20])
def test_what_float16_holds_only_once_it_is_normalised(rows, gate):
    """Before, it times the norm's weight is infinite, or has few of its bits left."""
    arguments = inputs(rows, 40, 200, torch.float16, False, True, False, gate) | {"eps": 1e-9}
    arguments["x"][:, 7], arguments["norm"][7] = 20000.0, 4.0
    check(arguments)
    check(arguments | {"x": torch.randn(rows, 200, device=DEVICE).half() / 1000, "norm": arguments["norm"] / 100})


@kernel_test
@pytest.mark.parametrize("dtype", DOT_DTYPES)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (2, 7), (37, 129), (130, 64), (2, 5003)])
def test_odd_sizes(any_rows, n, k, dtype):
    check(inputs(2, n, k, dtype, True, True, True, None))
    check(inputs(1, 2 * n, k, dtype, False, False, False, "silu"))


@kernel_test
@pytest.mark.parametrize("dtype", DOT_DTYPES)
@pytest.mark.parametrize("column", range(4))
@pytest.mark.parametrize("rows", [1, 4, 5])
def test_every_tile_shape(any_rows, monkeypatch, rows, column, dtype):
    monkeypatch.setattr(linear_module, "TILES", [[row[column]] * 4 for row in linear_module.TILES])
    check(inputs(rows, 70, 4100, dtype, False, True, False, "silu"))


@kernel_test
@pytest.mark.parametrize("rows", [0, linear_module.SMALL_BATCH, linear_module.SMALL_BATCH + 1])
def test_any_batch(rows):
    arguments = inputs(rows, 24, 40, torch.float32, False, True, True, None)
    if rows:
        check(arguments)
    else:
        assert linear(**arguments).shape == (0, 24)


@kernel_test
def test_which_rows_are_few():
    """Of large weights fewer behind a norm, which the library then computes apart."""
    x = torch.randn(8, 4096, device=DEVICE, dtype=torch.bfloat16)
    small, large = (torch.empty(rows, 4096, device=DEVICE, dtype=torch.bfloat16) for rows in (2047, 2048))
    for weight, is_normed, few in ((small, True, 8), (small, False, 8), (large, False, 8), (large, True, 4)):
        assert takes_few_rows(x[:few], weight, is_normed)
        assert few == 8 or not takes_few_rows(x[: few + 1], weight, is_normed)


@pytest.fixture
def only_hopper(monkeypatch):
    """Hopper's own kernel takes any rows, and fresh memory holds NaN."""
    if DEVICE == "cpu" or torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs Hopper")
    monkeypatch.setattr(linear_module, "hopper_rows_pay", lambda rows, nbytes, is_normed: True)
    monkeypatch.setattr(linear_module, "launch_linear", None)
    monkeypatch.setattr(linear_module, "linear_torch", None)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(math.nan))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("combination", COMBINATIONS)
def test_every_combination_on_hopper(only_hopper, combination, dtype):
    check(inputs(24, 72, 200, dtype, *combination))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 7, 8, 9, 16, 33, 63, 64])
def test_every_number_of_rows_on_hopper(only_hopper, rows):
    check(inputs(rows, 128, 1024, torch.bfloat16, False, True, True, None))


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "k"), [(2, 8), (1024, 72), (2112, 3000), (4160, 5000), (70, 128)])
@pytest.mark.parametrize("gate", [None, "silu"])
def test_odd_sizes_on_hopper(only_hopper, gate, n, k):
    """Few features and many, parts of a tile, fewer parts of K than there is room for, and more."""
    check(inputs(17, n, k, torch.bfloat16, True, False, False, gate))


@pytest.mark.gpu
def test_a_norm_in_float32_on_hopper(only_hopper):
    arguments = inputs(20, 40, 200, torch.bfloat16, False, True, False, None)
    check(arguments | {"norm": 1 + torch.randn(200, device=DEVICE) / 1000})


@pytest.mark.gpu
def test_what_hopper_does_not_take(only_hopper):
    x, weight = torch.randn(2, 20, 256, device=DEVICE).bfloat16()
    assert linear_module.takes_hopper_rows(x, weight, is_normed=False)
    assert not linear_module.takes_hopper_rows(x.float(), weight.float(), is_normed=False)
    assert not linear_module.takes_hopper_rows(x[:, :252], weight[:, :252], is_normed=False)
    assert not linear_module.takes_hopper_rows(x[:, 4:252], weight[:, 4:252], is_normed=False)
    assert not linear_module.takes_hopper_rows(x[:, 1:249], weight[:, 1:249], is_normed=False)


@kernel_test
@pytest.mark.parametrize("rows", [1, 20, 300])
def test_e4m3_that_kernels_cannot_read(monkeypatch, rows):
    """As on GPUs before compute capability 8.9: rows are not rounded, and torch makes numbers of the codes."""
    monkeypatch.setattr(quantized_weight, "has_e4m3", lambda device: False)
    for launch in ("launch_quantized_linear", "multiply_tiles", "round_rows"):
        module = linear_module if launch == "launch_quantized_linear" else quantized_products
        monkeypatch.setattr(module, launch, None)
    arguments = inputs(rows, 256, 128, torch.float32, True, True, True, "silu")
    codes, scales = (arguments["weight"] * 100).to(torch.float8_e4m3fn), torch.full((256, 1), 0.01, device=DEVICE)
    weight = QuantizedWeight(codes, scales, (1, 128), rounds_input=True)
    expected = definition(**arguments | {"weight": codes.float() * scales})
    y = linear(**arguments | {"weight": weight})
    assert ((y - expected).norm() / expected.norm()).item() < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("size", [1024, math.isqrt(LARGE_WEIGHT_BYTES // 2)])
def test_a_chain_of_layers_in_a_cuda_graph(size, rows):
    """Kernels that overlap still see what those before them wrote, and overwrite nothing that is still read."""
    layers = [
        [
            inputs(rows, n, k, torch.bfloat16, *flags)
            for n, k, flags in ((2 * size, size, (0, 1, 0, None)), (size, 2 * size, (0, 0, 0, None)))
        ]
        for _ in range(16)
    ]
    start, h = torch.randn(2, rows, size, device=DEVICE).bfloat16()

    def run():
        for first, second in layers:
            y = linear(h, first["weight"], norm=first["norm"], eps=1e-6)
            linear(y, second["weight"], residual=h)

    h.copy_(start)
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    expected = start.double()
    for first, second in layers:
        y = definition(expected, first["weight"], None, first["norm"], 1e-6, None, None)
        expected = definition(y, second["weight"], None, None, 0.0, expected, None)
    results = []
    for _ in range(20):
        h.copy_(start)
        graph.replay()
        results.append(h.clone())
    assert ((results[0] - expected).norm() / expected.norm()).item() < 0.05
    assert all(torch.equal(result, results[0]) for result in results)
