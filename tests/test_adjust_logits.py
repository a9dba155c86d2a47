"""Adjusted logits and logprobs: torch's are as defined; the kernels equal them, in the interpreter and on a GPU."""

import math

import pytest
import torch
from interpreter import DEVICE, kernel_test, plain_test, run_in_interpreter

from nanovllm.kernels import HAS_TRITON
from nanovllm.kernels import logprobs as logprobs_module
from nanovllm.kernels.adjust_logits import (
    COUNT_SHIFT,
    ENDS_TEXT,
    IN_PROMPT,
    IS_ALLOW_LIST,
    LISTED,
    USES_BIAS,
    USES_MASK,
    USES_TABLE,
    LogitTables,
    adjust_logits,
    adjust_logits_torch,
    count_tokens,
)
from nanovllm.kernels.logprobs import top_logprobs, top_logprobs_torch

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ALL_FLAGS = range(16)


@plain_test
@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
def test_in_the_interpreter():
    run_in_interpreter(__file__)


# ---- adjusted logits ----------------------------------------------------------------------------------------------


def random_case(size, dtype=torch.float32, device="cpu", rows=None):
    """Arguments of `adjust_logits`: a row of the tables for each combination of flags, in a random order."""
    num_rows = len(ALL_FLAGS)
    rows = torch.randperm(num_rows) if rows is None else torch.tensor(rows)
    logits = torch.randn(len(rows), size) * 3
    logits[torch.rand(logits.shape) < 0.05] = -math.inf
    logits[torch.rand(logits.shape) < 0.05] = 0.0
    logits[torch.rand(logits.shape) < 0.02] = -0.0
    logits[torch.rand(logits.shape) < 0.02] = math.nan
    row_ints = torch.randint(2**40, (4, num_rows))
    row_ints[2] = torch.randint(20, (num_rows,))
    row_ints[3] = torch.tensor(ALL_FLAGS)
    row_floats = torch.rand(6, num_rows) * 2
    row_floats[3:5] -= 1
    row_floats[5, ::5] = 1.0
    tokens = torch.randint(8, (num_rows, size)) | (torch.randint(-9, 4, (num_rows, size)).clamp(min=0) << COUNT_SHIFT)
    bias = torch.randn(num_rows, size) * (torch.rand(num_rows, size) < 0.3)
    bias[:, ::17] = -math.inf
    mask = torch.randint(-(2**31), 2**31, (num_rows, -(-size // 32)))
    # What a row does not use must not matter.
    tokens[row_ints[3] & USES_TABLE == 0] = -1
    bias[row_ints[3] & USES_BIAS == 0] = math.nan
    mask[row_ints[3] & USES_MASK == 0] = 0
    tables = LogitTables(tokens.int(), bias, mask.int())
    positions = torch.randint(20, (len(rows),), dtype=torch.int32)
    arguments = logits.to(dtype), rows, positions, row_ints, row_floats
    return *(x.to(device) for x in arguments), LogitTables(*(x.to(device) for x in tables))


def adjust_by_definition(x, position, ints, floats, entry, bias, is_allowed):
    """One logit, in Python's numbers (float64)."""
    _, _, min_length, flags = ints
    _, _, _, presence, frequency, repetition = floats
    count = entry >> COUNT_SHIFT
    is_forbidden = flags & USES_MASK and not is_allowed
    if flags & USES_TABLE:
        is_forbidden |= bool(entry & LISTED) != bool(flags & IS_ALLOW_LIST)
        is_forbidden |= bool(entry & ENDS_TEXT) and position < min_length
    if is_forbidden or x == -math.inf:
        return -math.inf
    if flags & USES_BIAS:
        x += bias
    if flags & USES_TABLE:
        if entry & IN_PROMPT or count:
            x = x / repetition if x > 0 else x * repetition
        if count:
            x -= frequency * count + presence
    return x


@plain_test
def test_adjusted_logits_are_as_defined():
    torch.manual_seed(0)
    size = 70
    logits, rows, positions, row_ints, row_floats, tables = random_case(size)
    adjusted = adjust_logits_torch(logits, rows, positions, row_ints, row_floats, tables)
    expected = [
        [
            adjust_by_definition(
                logits[i, token_id].item(),
                positions[i].item(),
                row_ints[:, row].tolist(),
                row_floats[:, row].tolist(),
                tables.tokens[row, token_id].item(),
                tables.bias[row, token_id].item(),
                tables.mask[row, token_id // 32].item() >> token_id % 32 & 1,
            )
            for token_id in range(size)
        ]
        for i, row in enumerate(rows.tolist())
    ]
    assert adjusted.dtype == torch.float32
    torch.testing.assert_close(adjusted, torch.tensor(expected), equal_nan=True, rtol=1e-5, atol=1e-5)


@plain_test
def test_rows_that_ask_for_nothing_are_copied():
    torch.manual_seed(0)
    *arguments, tables = random_case(50, torch.bfloat16, rows=[0, 0, 0])  # row 0 has no flags
    for these in (tables, LogitTables(tables.tokens)):
        adjusted = adjust_logits_torch(*arguments, these)
        assert torch.equal(adjusted.view(torch.int32), arguments[0].float().view(torch.int32))


@plain_test
def test_a_row_of_forbidden_tokens():
    """Nothing is left, and nothing becomes NaN, whatever the penalties."""
    tokens = torch.full((1, 40), LISTED | IN_PROMPT | 2 << COUNT_SHIFT, dtype=torch.int32)
    row_ints = torch.tensor([[0], [0], [0], [USES_TABLE | USES_BIAS]])
    row_floats = torch.tensor([[1.0], [1.0], [0.0], [-2.0], [-2.0], [1e-45]])
    zero = torch.zeros(1, dtype=torch.int64)
    tables = LogitTables(tokens, torch.full((1, 40), math.inf))
    adjusted = adjust_logits_torch(torch.randn(1, 40), zero, zero, row_ints, row_floats, tables)
    assert (adjusted == -math.inf).all()


@kernel_test
@pytest.mark.parametrize(("dtype", "size"), list(zip(DTYPES, (4500, 5, 4096), strict=True)))
def test_adjusted_logits_of_the_kernel(dtype, size):
    """Bit for bit, with all tables and without the optional ones."""
    torch.manual_seed(size)
    logits, *arguments, tables = random_case(size, dtype, DEVICE)
    wider = torch.cat((logits, logits), dim=1)[:, :size]  # rows may stand apart
    for names in ((), ("bias",), ("bias", "mask")):
        these = tables._replace(**dict.fromkeys(names))
        adjusted = adjust_logits(wider, *arguments, these)
        expected = adjust_logits_torch(logits, *arguments, these)
        assert adjusted.dtype == torch.float32 and adjusted.is_contiguous()
        assert torch.equal(adjusted.isnan(), expected.isnan())
        assert torch.equal(adjusted.nan_to_num(7).view(torch.int32), expected.nan_to_num(7).view(torch.int32))
        assert torch.equal(wider.nan_to_num(7), logits.nan_to_num(7))  # unchanged


@pytest.mark.gpu
def test_adjusting_and_counting_in_a_cuda_graph():
    """It follows what the tables and the flags become."""
    torch.manual_seed(0)
    arguments = random_case(151_936, torch.bfloat16, "cuda")
    logits, rows, _, row_ints, _, tables = arguments
    token_ids = torch.randint(151_936, (len(rows),), device="cuda")
    adjust_logits(*arguments)
    count_tokens(tables.tokens, rows, token_ids)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        adjusted = adjust_logits(*arguments)
        count_tokens(tables.tokens, rows, token_ids)
    for _ in range(3):
        logits.copy_(torch.randn(logits.shape))
        row_ints[3] = row_ints[3].roll(1)
        tables.bias.copy_(torch.randn(tables.bias.shape))
        token_ids.copy_(torch.randint(-1, 151_936, token_ids.shape))
        expected = adjust_logits_torch(*arguments)
        counted = tables.tokens.clone()
        count_tokens(counted, rows, token_ids)
        graph.replay()
        assert torch.equal(adjusted, expected)
        assert torch.equal(tables.tokens, counted)


@pytest.mark.gpu
def test_adjusting_by_tables_of_more_than_2_to_the_31_elements():
    if torch.cuda.mem_get_info()[0] < 30 * 2**30:
        pytest.skip("needs 30 GiB of free GPU memory")
    size, num_rows = 151_936, 14_200
    tables = LogitTables(
        torch.zeros(num_rows, size, dtype=torch.int32, device="cuda"), torch.zeros(num_rows, size, device="cuda")
    )
    rows = torch.tensor([num_rows - 1, 3], device="cuda")
    row_ints = torch.full((4, num_rows), USES_TABLE | USES_BIAS, device="cuda")
    row_floats = torch.ones(6, num_rows, device="cuda")
    count_tokens(tables.tokens, rows, torch.tensor([size - 1, size - 1], device="cuda"))
    tables.bias[rows, 5] = 4.0
    adjusted = adjust_logits(torch.ones(2, size, device="cuda"), rows, rows, row_ints, row_floats, tables)
    assert adjusted[:, 5].tolist() == [5.0] * 2 and adjusted[:, -1].tolist() == [-1.0] * 2
    assert (adjusted == 1).sum() == 2 * (size - 2)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@plain_test
def test_count_tokens(device):
    before = torch.arange(15, dtype=torch.int32, device=device).view(3, 5)
    tokens = before.clone()
    rows, token_ids = torch.tensor([[2, 0, 1, 2, 0], [4, 0, -1, 4, 3]], device=device)
    count_tokens(tokens, rows, token_ids)
    expected = torch.zeros(3, 5, dtype=torch.int32, device=device)
    expected[2, 4], expected[0, 0], expected[0, 3] = 2, 1, 1
    assert torch.equal(tokens - before, expected << COUNT_SHIFT)


# ---- logprobs -----------------------------------------------------------------------------------------------------


def random_logits(num_rows, size, dtype):
    """With ties, few other than -inf in the last row but one, and all alike in the last."""
    logits = (torch.randn(num_rows, size) * 2).to(dtype)
    logits[0] = logits[0].round()
    logits[1, torch.rand(size) < 0.5] = -math.inf
    logits[-2, 3:-2] = -math.inf
    logits[-1] = 1.5
    return logits.to(DEVICE)


@plain_test
@pytest.mark.parametrize("dtype", DTYPES)
def test_logprobs_are_as_defined(dtype):
    torch.manual_seed(0)
    logits = random_logits(5, 60, dtype).cpu()
    token_ids = torch.tensor([59, 7, -1, 1, 30])
    values, ids, ranks = top_logprobs_torch(logits, token_ids, 20)
    expected = logits.double().log_softmax(dim=1)
    for i, token_id in enumerate(token_ids.clamp(min=0).tolist()):
        row = expected[i].tolist()
        best = sorted(range(60), key=lambda token_id: (-row[token_id], token_id))[:20]
        assert ids[i].tolist() == [token_id, *best]
        assert ranks[i] == 1 + sum(value > row[token_id] for value in row)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.double(), expected.gather(1, ids), rtol=1e-5, atol=1e-5)


def assert_equal_logprobs(actual, expected):
    values, ids, ranks = actual
    torch.testing.assert_close(values, expected[0], rtol=2e-6, atol=2e-6, equal_nan=True)
    assert torch.equal(ids, expected[1]) and torch.equal(ranks, expected[2])


@kernel_test
@pytest.mark.parametrize(
    ("dtype", "size", "num_top"),
    [
        (torch.float32, 100, 20),
        (torch.float32, 1024, 1),
        (torch.float16, 700, 0),
        (torch.bfloat16, 300, 8),
        (torch.bfloat16, 1003, 5),
    ],
)
def test_logprobs_of_the_kernel(dtype, size, num_top, monkeypatch):
    """In parts that the interpreter is done with soon; the last one is full or not, and may have too few tokens."""
    monkeypatch.setattr(logprobs_module, "LANES", 64)
    monkeypatch.setattr(logprobs_module, "TILES", 4)
    torch.manual_seed(size + num_top)
    logits = random_logits(4, size, dtype)
    token_ids = torch.tensor([[7, 0], [-1, 0], [1, 0], [size - 1, 0]], device=DEVICE)[:, 0]  # not side by side
    wider = torch.cat((logits, logits), dim=1)[:, :size]
    assert_equal_logprobs(top_logprobs(wider, token_ids, num_top), top_logprobs_torch(logits, token_ids, num_top))


@kernel_test
def test_logprobs_of_whole_parts():
    """As large as they are in use; and more of the most likely tokens than the kernel is asked for."""
    torch.manual_seed(0)
    logits = random_logits(2, 20_000, torch.bfloat16)
    logits[0, [19_999, 3, 8195]] = 50.0
    token_ids = torch.tensor([8195, 19_990], device=DEVICE)
    for num_top in (5, 200):
        expected = top_logprobs_torch(logits, token_ids, num_top)
        assert_equal_logprobs(top_logprobs(logits, token_ids, num_top), expected)
        assert expected[1][0, :4].tolist() == [8195, 3, 8195, 19_999] and expected[2][0] == 1


@kernel_test
def test_logprobs_of_nan():
    """A row with NaN has no other values; the rows beside it are not touched."""
    torch.manual_seed(0)
    logits = random_logits(3, 300, torch.float32)
    logits[1, 70] = math.nan
    token_ids = torch.tensor([1, 2, 3], device=DEVICE)
    values, ids, ranks = top_logprobs(logits, token_ids, 3)
    assert values[1].isnan().all()
    expected = top_logprobs_torch(logits, token_ids, 3)
    assert expected[0][1].isnan().all()
    others = [0, 2]
    assert_equal_logprobs((values[others], ids[others], ranks[others]), [x[others] for x in expected])


@pytest.mark.gpu
@pytest.mark.parametrize("num_top", [0, 5, 20])
def test_logprobs_in_a_cuda_graph(num_top):
    torch.manual_seed(0)
    logits = random_logits(64, 151_936, torch.bfloat16)
    token_ids = torch.randint(-1, 151_936, (64,), device="cuda")
    top_logprobs(logits, token_ids, num_top)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = top_logprobs(logits, token_ids, num_top)
    for _ in range(3):
        logits.copy_(random_logits(64, 151_936, torch.bfloat16))
        token_ids.copy_(torch.randint(-1, 151_936, (64,)))
        graph.replay()
        assert_equal_logprobs(results, top_logprobs_torch(logits, token_ids, num_top))
