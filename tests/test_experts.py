"""Mixtures of experts: torch's functions are as defined; the kernels equal them, in the interpreter and on a GPU."""

import pytest
import torch
import torch.nn.functional as F
from interpreter import DEVICE, kernel_test, plain_test, run_in_interpreter
from kernel_data import rounded

from nanovllm.kernels import HAS_TRITON, INTERPRETED
from nanovllm.kernels.experts import down_experts, down_experts_torch, gate_up_experts, gate_up_experts_torch
from nanovllm.kernels.quantized_weight import QuantizedWeight
from nanovllm.kernels.routing import route, route_torch
from nanovllm.kernels.tuning import FEW_TOKENS

DTYPES = [torch.float32] if INTERPRETED else [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 5e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
TOKENS = (1, FEW_TOKENS, FEW_TOKENS + 1, 40) if INTERPRETED else (1, 2, 4, 5, 16, 131, 256, 4096)
SHAPES = [(8, 2), (5, 3), (128, 8)]  # experts, of a token


@pytest.mark.slow
@plain_test
@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
def test_in_the_interpreter():
    run_in_interpreter(__file__)


def zero_counts(num_experts):
    return torch.zeros(num_experts, dtype=torch.int32, device=DEVICE)


def check_order(routing, num_experts):
    """Each expert has its own pairs, each once."""
    experts = routing.experts.flatten().cpu()
    counts = experts.bincount(minlength=num_experts)
    assert routing.counts.tolist() == counts.tolist()
    for expert in range(num_experts):
        pairs = routing.order[expert, : counts[expert]].tolist()
        assert sorted(pairs) == (experts == expert).nonzero().flatten().tolist()


# ---- routing ------------------------------------------------------------------------------------------------------


def definition(logits, top_k, is_renormalised):
    """Probabilities, one token after another; of equals, the first."""
    weights, experts = [], []
    for row in logits.double().softmax(-1).tolist():
        chosen = sorted(range(len(row)), key=lambda expert: (-row[expert], expert))[:top_k]
        total = sum(row[expert] for expert in chosen) if is_renormalised else 1.0
        experts.append(chosen)
        weights.append([row[expert] / total for expert in chosen])
    return torch.tensor(weights), torch.tensor(experts)


@pytest.mark.parametrize("is_renormalised", [False, True])
@pytest.mark.parametrize(("num_experts", "top_k"), SHAPES)
@plain_test
def test_torch_routes_as_defined(num_experts, top_k, is_renormalised):
    logits = torch.randn(20, num_experts).mul(2).round()  # which has ties
    routing = route_torch(logits, top_k, is_renormalised, torch.zeros(num_experts, dtype=torch.int32))
    weights, experts = definition(logits, top_k, is_renormalised)
    assert routing.experts.tolist() == experts.tolist()
    torch.testing.assert_close(routing.weights.double(), weights.double(), rtol=1e-5, atol=1e-7)


@kernel_test
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_renormalised", [False, True])
@pytest.mark.parametrize(("num_experts", "top_k"), SHAPES)
@pytest.mark.parametrize("num_tokens", TOKENS)
def test_route(num_tokens, num_experts, top_k, is_renormalised, dtype):
    logits = torch.randn(num_tokens, num_experts, device=DEVICE).mul(3).round().div(2).to(dtype)
    routing = route(logits, top_k, is_renormalised, zero_counts(num_experts))
    expected = route_torch(logits, top_k, is_renormalised, zero_counts(num_experts))
    assert torch.equal(routing.experts, expected.experts)
    torch.testing.assert_close(routing.weights, expected.weights, rtol=1e-5, atol=1e-7)
    assert (routing.order is None) == (num_tokens <= FEW_TOKENS)
    if routing.order is not None:
        check_order(routing, num_experts)


@kernel_test
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_row_has_experts_of_its_own(bad):
    """As many as others, so that nothing is written where theirs stand; others are routed as without it."""
    logits = torch.randn(9, 16, device=DEVICE)
    expected = route(logits, 4, True, zero_counts(16))
    logits[4] = bad
    routing = route(logits, 4, True, zero_counts(16))
    assert len(set(routing.experts[4].tolist())) == 4
    check_order(routing, 16)
    others = torch.arange(9) != 4
    assert torch.equal(routing.experts[others], expected.experts[others])
    assert torch.equal(routing.weights[others], expected.weights[others])


# ---- products -----------------------------------------------------------------------------------------------------


def routing_of(experts, num_experts, weights=None):
    """A routing by hand: experts, int [T, K]."""
    logits = torch.full((len(experts), num_experts), -4.0)
    slots = torch.arange(experts.size(1), 0, -1).float().expand(experts.shape)
    logits.scatter_(1, experts.long(), slots)
    routing = route(logits.to(DEVICE), experts.size(1), True, zero_counts(num_experts))
    assert torch.equal(routing.experts.cpu(), experts.int())
    return routing


def spread(num_tokens, num_experts, top_k):
    return torch.stack([torch.randperm(num_experts)[:top_k] for _ in range(num_tokens)])


ROUTINGS = {
    "spread": spread,
    "all to some": lambda num_tokens, num_experts, top_k: torch.arange(top_k).repeat(num_tokens, 1),
    "one gets nothing": lambda num_tokens, num_experts, top_k: spread(num_tokens, num_experts - 1, top_k) + 1,
}


def random_mlp(num_tokens, num_experts, hidden, intermediate, dtype):
    def randn(*shape, scale=1.0):
        return torch.randn(shape, device=DEVICE).mul(scale).to(dtype)

    x = randn(num_tokens, hidden)
    gate_up = randn(num_experts, 2 * intermediate, hidden, scale=hidden**-0.5)
    down = randn(num_experts, hidden, intermediate, scale=intermediate**-0.5)
    return x, gate_up, down


def mlp_definition(x, gate_up, down, routing, residual):
    """In float64, one token after another."""
    x, gate_up, down, weights = (tensor.double() for tensor in (x, gate_up, down, routing.weights))
    out = torch.zeros_like(x)
    for token, experts in enumerate(routing.experts.tolist()):
        for slot, expert in enumerate(experts):
            gate, up = (gate_up[expert] @ x[token]).chunk(2)
            out[token] += weights[token, slot] * (down[expert] @ (F.silu(gate) * up))
    return out if residual is None else residual.double() + out


@plain_test
def test_torch_multiplies_as_defined():
    x, gate_up, down = random_mlp(7, 5, 12, 10, torch.float32)
    routing = route_torch(torch.randn(7, 5), 3, False, torch.zeros(5, dtype=torch.int32))
    y = down_experts_torch(gate_up_experts_torch(x, gate_up, routing), down, routing, residual=x.clone())
    torch.testing.assert_close(y.double(), mlp_definition(x, gate_up, down, routing, x), rtol=1e-5, atol=1e-5)
    assert not routing.counts.any()


@kernel_test
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ROUTINGS)
@pytest.mark.parametrize("num_tokens", TOKENS)
@pytest.mark.parametrize(
    ("num_experts", "top_k", "hidden", "intermediate"),
    [(8, 2, 48, 40), (6, 3, 64, 24), (4, 1, 40, 16)]
    if INTERPRETED
    else [(8, 2, 200, 136), (128, 8, 2048, 768), (6, 3, 512, 520), (4, 1, 512, 256)],
)
def test_products(num_experts, top_k, hidden, intermediate, num_tokens, kind, dtype):
    experts = ROUTINGS[kind](num_tokens, num_experts, top_k)
    routing = routing_of(experts, num_experts)
    x, gate_up, down = random_mlp(num_tokens, num_experts, hidden, intermediate, dtype)
    h = gate_up_experts(x, gate_up, routing)
    tolerance = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(h, gate_up_experts_torch(x, gate_up, routing), **tolerance)
    base = torch.full((num_tokens, hidden + 8), torch.nan, device=DEVICE, dtype=dtype)
    residual = base[:, :hidden]
    residual.copy_(x)
    counts = routing.counts.clone()
    expected = down_experts_torch(h, down, routing._replace(counts=counts), x.clone())
    assert down_experts(h, down, routing, residual) is residual
    torch.testing.assert_close(residual, expected, **tolerance)
    assert base[:, hidden:].isnan().all()
    assert not routing.counts.any()


@kernel_test
@pytest.mark.parametrize("num_tokens", range(1, FEW_TOKENS + 1))
def test_the_norm_before_few_rows(num_tokens):
    routing = routing_of(spread(num_tokens, 6, 2), 6)
    x, gate_up, _ = random_mlp(num_tokens, 6, 48, 20, torch.float32)
    norm = torch.rand(48, device=DEVICE)
    h = gate_up_experts(x, gate_up, routing, norm, 0.5)
    torch.testing.assert_close(h, gate_up_experts_torch(x, gate_up, routing, norm, 0.5), rtol=1e-4, atol=1e-5)


# ---- weights in 8 bits --------------------------------------------------------------------------------------------

BLOCKS = {  # of gates and ups, and of downs; None: each row has a scale
    "blocks": ((128, 128), (128, 128)),
    "joined": ((1, 128), (128, 128)),  # as where the ups begin within a block
    "rows": (None, None),
}
EIGHT_BIT_CASES = (
    [(1, "spread"), (2, "one gets nothing"), (FEW_TOKENS + 1, "all to some"), (64, "one gets nothing")]
    if INTERPRETED
    else [
        *((num_tokens, "spread") for num_tokens in TOKENS),
        *((FEW_TOKENS, "all to some"), (256, "all to some"), (131, "one gets nothing")),
    ]
)
EIGHT_BIT_SHAPES = (  # experts, of a token, hidden, intermediate
    [(4, 2, 144, 72)] if INTERPRETED else [(8, 2, 1000, 512), (128, 8, 2048, 768), (6, 3, 512, 640), (4, 1, 400, 136)]
)


def in_8_bits(num_experts, num_features, size, block):
    """Random codes and scales, whose numbers' squares sum up to 1, more or less, in a row."""
    height, width = block or (1, size)
    numbers = torch.randn(num_experts, num_features, size, device=DEVICE) * 100
    codes = numbers.clamp(-448, 448).to(torch.float8_e4m3fn)  # beyond, older versions make NaN
    scales = torch.rand(num_experts, -(-num_features // height), -(-size // width), device=DEVICE) + 0.5
    return QuantizedWeight(codes, scales / (100 * size**0.5), (height, width))


@plain_test
@pytest.mark.parametrize("blocks", BLOCKS)
def test_torch_multiplies_numbers_of_codes(blocks):
    gate_up, down = in_8_bits(5, 280, 160, BLOCKS[blocks][0]), in_8_bits(5, 160, 140, BLOCKS[blocks][1])
    x = torch.randn(7, 160, device=DEVICE)
    routing = route_torch(torch.randn(7, 5, device=DEVICE), 3, False, zero_counts(5))
    y = down_experts_torch(gate_up_experts_torch(x, gate_up, routing), down, routing, residual=x.clone())
    expected = mlp_definition(x, gate_up.dequantize(torch.float64), down.dequantize(torch.float64), routing, x)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


@kernel_test
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize(("num_tokens", "kind"), EIGHT_BIT_CASES)
@pytest.mark.parametrize(("num_experts", "top_k", "hidden", "intermediate"), EIGHT_BIT_SHAPES)
def test_products_in_8_bits(num_experts, top_k, hidden, intermediate, num_tokens, kind, blocks, dtype):
    """As near to numbers without rounding as the plain statement is, which rounds the rows of many tokens to e4m3."""
    if blocks == "blocks":  # else a scale would be of gates and ups
        intermediate = -(-intermediate // 128) * 128
    routing = routing_of(ROUTINGS[kind](num_tokens, num_experts, top_k), num_experts)
    gate_up = in_8_bits(num_experts, 2 * intermediate, hidden, BLOCKS[blocks][0])
    down = in_8_bits(num_experts, hidden, intermediate, BLOCKS[blocks][1])
    x = torch.randn(num_tokens, hidden, device=DEVICE).to(dtype)
    counts = routing.counts.clone()
    h = gate_up_experts(x, gate_up, routing)
    y = down_experts(h, down, routing, x.clone())
    assert not routing.counts.any()
    routing = routing._replace(counts=counts)
    is_rounded = num_tokens > FEW_TOKENS
    plain_h = gate_up_experts_torch(rounded(x, gate_up.block[1]) if is_rounded else x, gate_up, routing)
    plain_y = down_experts_torch(rounded(plain_h, down.block[1]) if is_rounded else plain_h, down, routing, x.clone())
    if dtype == torch.float32 and not is_rounded:
        torch.testing.assert_close(h, plain_h, rtol=5e-5, atol=5e-5)
        torch.testing.assert_close(y, plain_y, rtol=5e-5, atol=5e-5)
        return
    exact_h = gate_up_experts_torch(x.double(), gate_up, routing)
    exact_y = down_experts_torch(exact_h, down, routing, x.double())
    slack = 0.08 if INTERPRETED and is_rounded else 0.0  # the interpreter truncates to e4m3
    for actual, plain, exact in ((h, plain_h, exact_h), (y, plain_y, exact_y)):
        assert (actual - exact).norm() <= 1.2 * (plain - exact).norm() + slack * exact.norm()


@kernel_test
@pytest.mark.parametrize("blocks", ["joined", "rows"])
def test_the_norm_before_few_rows_in_8_bits(blocks):
    routing = routing_of(spread(2, 6, 2), 6)
    gate_up = in_8_bits(6, 48, 160, BLOCKS[blocks][0])
    x, norm = torch.randn(2, 160, device=DEVICE), torch.rand(160, device=DEVICE)
    h = gate_up_experts(x, gate_up, routing, norm, 0.5)
    torch.testing.assert_close(h, gate_up_experts_torch(x, gate_up, routing, norm, 0.5), rtol=1e-4, atol=1e-5)


@kernel_test
@pytest.mark.parametrize("blocks", [None, "joined", "rows"])
def test_what_float16_holds_only_once_it_is_normalised(blocks):
    """Before, it times the norm's weight is infinite."""
    routing = routing_of(spread(2, 6, 2), 6)
    gate_up = torch.randn(6, 48, 160, device=DEVICE).half() / 12
    if blocks:
        gate_up = in_8_bits(6, 48, 160, BLOCKS[blocks][0])
    x, norm = torch.randn(2, 160, device=DEVICE).half(), torch.rand(160, device=DEVICE).half()
    x[:, 7], norm[7] = 20000.0, 4.0
    h = gate_up_experts(x, gate_up, routing, norm, 1e-6)
    exact = gate_up_experts_torch(x.double(), gate_up if blocks else gate_up.double(), routing, norm.double(), 1e-6)
    assert (h - exact).norm() <= TOLERANCE[torch.float16] * exact.norm()  # false for NaN


@kernel_test
@pytest.mark.parametrize("num_tokens", [1, FEW_TOKENS, 9])
def test_rows_longer_than_what_is_read_ahead_in_8_bits(num_tokens):
    is_rounded = num_tokens > FEW_TOKENS
    routing = routing_of(spread(num_tokens, 3, 2), 3)
    gate_up, down = in_8_bits(3, 16, 2600, (1, 128)), in_8_bits(3, 24, 2600, (128, 128))
    x, h = torch.randn(num_tokens, 2600, device=DEVICE), torch.randn(2 * num_tokens, 2600, device=DEVICE)
    plain_x, plain_h = (rounded(rows, 128) if is_rounded else rows for rows in (x, h))
    expected_h = gate_up_experts_torch(plain_x, gate_up, routing)
    expected_y = down_experts_torch(plain_h, down, routing._replace(counts=routing.counts.clone()))
    actual_h, actual_y = gate_up_experts(x, gate_up, routing), down_experts(h, down, routing)
    for actual, expected in ((actual_h, expected_h), (actual_y, expected_y)):
        if is_rounded:  # the interpreter truncates to e4m3
            assert (actual - expected).norm() <= (0.1 if INTERPRETED else 5e-3) * expected.norm()
        else:
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
