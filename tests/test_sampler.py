"""Draws follow the exact distribution (chi-square) and depend on nothing but the request's seed and position."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from nanovllm.kernels.sampling import unpack_token_ids
from nanovllm.layers.sampler import Sampler
from nanovllm.parallel.tensor_parallel import TensorParallel

NUM_DRAWS = 20_000
VOCAB_SIZE = 40
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def sampling_inputs(num_rows: int, device: str = "cpu", **options) -> tuple:
    """What the sampler takes besides logits. Options are numbers for all rows, or tensors with one for each."""

    def tensor(dtype, **defaults):
        values = [torch.as_tensor(options.get(name, value)).expand(num_rows) for name, value in defaults.items()]
        return torch.stack([value.to(device, dtype) for value in values])

    row_ints = tensor(torch.int64, top_ks=-1, seeds=0)
    row_floats = tensor(torch.float32, temperatures=1.0, top_ps=1.0, min_ps=0.0)
    is_filtered = bool((row_ints[0] > 0).any() or (row_floats[1] < 1).any() or (row_floats[2] > 0).any())
    rows = torch.arange(num_rows, device=device)
    return rows, row_ints, row_floats, tensor(torch.int32, positions=0)[0], is_filtered


def sample(logits: torch.Tensor, device: str = "cpu", backend: str = "auto", **options) -> torch.Tensor:
    """Token ids for each row of logits."""
    config = SimpleNamespace(
        device=device,
        tensor_parallel_size=1,
        pipeline_parallel_size=1,
        num_ranks=1,
        torch_dtype=torch.float32,
        max_num_batched_tokens=1,
        model_config=SimpleNamespace(hidden_size=1, num_hidden_layers=1),
    )
    sampler = Sampler(TensorParallel(config, 0), backend)
    packed = sampler(logits.to(device).contiguous(), *sampling_inputs(len(logits), device, **options))
    return unpack_token_ids(packed).cpu()


def some_logits(size: int = VOCAB_SIZE) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(0))


def distribution(logits: torch.Tensor, temperature=1.0, top_k=-1, top_p=1.0, min_p=0.0) -> torch.Tensor:
    """What is to be drawn from, by the definitions: min-p, then top-k, then top-p of what is left."""
    p = (logits.double() / temperature).softmax(-1)
    p[p < min_p * p.max()] = 0
    if top_k > 0:
        p[p < p.sort(descending=True).values[min(top_k, len(p)) - 1]] = 0
    mass, kept = 0.0, torch.zeros_like(p)
    for token_id in p.argsort(descending=True).tolist():
        if mass < top_p * p.sum():
            kept[token_id] = p[token_id]
        mass += p[token_id]
    return kept / kept.sum()


def check_chi_square(token_ids: torch.Tensor, p: torch.Tensor) -> None:
    """Counts agree with probabilities p, at a significance of 1e-4."""
    counts = torch.bincount(token_ids, minlength=len(p)).double()
    assert counts[p == 0].sum() == 0, "a token was drawn that the filters remove"
    want = p[p > 0] * len(token_ids)
    assert want.min() >= 5, "the statistic needs at least five draws a token"
    statistic = ((counts[p > 0] - want) ** 2 / want).sum().item()
    n = len(want) - 1
    # The 1 - 1e-4 quantile of chi-square with n degrees of freedom (Wilson and Hilferty 1931).
    critical = n * (1 - 2 / (9 * n) + 3.719 * math.sqrt(2 / (9 * n))) ** 3 if n else 1e-9
    assert statistic < critical


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 1.7},
        {"top_k": 1},
        {"top_k": 7},
        {"top_k": 10**6},
        {"top_p": 0.9},
        {"top_p": 0.3},
        {"top_p": 1e-6},
        {"min_p": 0.1},
        {"min_p": 1.0},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.9},
        {"temperature": 1.5, "top_k": 20, "min_p": 0.1},
        {"temperature": 1.3, "top_p": 0.8, "min_p": 0.05},
        {"temperature": 0.7, "top_k": 10, "top_p": 0.95, "min_p": 0.02},
    ],
    ids=str,
)
@pytest.mark.parametrize("vary", ["seeds", "positions"])
def test_distribution(params, vary, device):
    """Draws that differ in the seed or in the position alone."""
    logits = some_logits()
    options = {name + "s": value for name, value in params.items()} | {vary: torch.arange(NUM_DRAWS)}
    drawn = sample(logits.expand(NUM_DRAWS, -1), device, **options)
    check_chi_square(drawn, distribution(logits, **params))


def test_the_chi_square_test_can_fail():
    logits = some_logits()
    drawn = sample(logits.expand(NUM_DRAWS, -1), seeds=torch.arange(NUM_DRAWS), temperatures=0.9)
    with pytest.raises(AssertionError):
        check_chi_square(drawn, distribution(logits))


@pytest.mark.parametrize("device", DEVICES)
def test_all_token_ids_are_alike(device):
    """Equal logits over a larger vocabulary: no id is favoured."""
    drawn = sample(torch.zeros(1, 400).expand(NUM_DRAWS, -1), device, seeds=torch.arange(NUM_DRAWS))
    check_chi_square(drawn, torch.full((400,), 1 / 400, dtype=torch.float64))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("seeds", "positions"),
    [((5, 5), (0, 1)), ((5, 5), (0, 256)), ((5, 6), (0, 0)), ((5, 5 + 2**32), (0, 0)), ((5, -5), (0, 0)),
     ((5, 6), (1, 0))],
)  # fmt: skip
def test_draws_are_independent(seeds, positions, device):
    """Pairs of draws whose seed or position differ a little are uniform over all pairs."""
    logits, steps = torch.zeros(1, 8).expand(NUM_DRAWS, -1), torch.arange(NUM_DRAWS)
    first, second = (
        sample(logits, device, seeds=seed, positions=steps * 3 + position)
        for seed, position in zip(seeds, positions, strict=True)
    )
    check_chi_square(first * 8 + second, torch.full((64,), 1 / 64, dtype=torch.float64))


@pytest.mark.parametrize("device", DEVICES)
def test_rows_of_a_batch_do_not_mix(device):
    """Greedy, plain and filtered rows in one batch each draw what they draw alone, in any order."""
    torch.manual_seed(0)
    n = 60
    logits = torch.randn(n, 500) * 3
    options = {
        "temperatures": torch.tensor([0.0, 0.7, 1.0, 0.0, 1.5, 1.0])[torch.arange(n) % 6],
        "top_ks": torch.tensor([-1, 0, 5, 3, 50])[torch.arange(n) % 5],
        "top_ps": torch.tensor([1.0, 0.9, 0.5, 1.0])[torch.arange(n) % 4],
        "min_ps": torch.tensor([0.0, 0.0, 0.1])[torch.arange(n) % 3],
        "seeds": torch.randint(-(2**63), 2**63 - 1, (n,)),
        "positions": torch.randint(0, 40_000, (n,)),
    }
    together = sample(logits, device, **options)
    order = torch.randperm(n)
    shuffled = sample(logits[order], device, **{name: values[order] for name, values in options.items()})
    assert torch.equal(shuffled, together[order])
    alone = [
        sample(logits[i : i + 1], device, **{name: values[i : i + 1] for name, values in options.items()}).item()
        for i in range(n)
    ]
    assert together.tolist() == alone
    greedy = options["temperatures"] == 0
    assert torch.equal(together[greedy], logits.argmax(-1)[greedy])
    assert not torch.equal(together[~greedy], logits.argmax(-1)[~greedy])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_greedy_takes_the_lowest_of_equals(device, dtype):
    logits = torch.full((3, 70_000), -5.0, dtype=dtype)
    logits[0, [60_000, 17]] = 2.5
    logits[1, [65_536, 69_999]] = -1.0
    assert sample(logits, device, temperatures=0.0).tolist() == [17, 65_536, 0]
    assert sample(logits, device, temperatures=torch.tensor([0.0, 0.0, 1.0])).tolist()[:2] == [17, 65_536]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("temperature", [1e-3, 1e-20, 1e-30])
def test_the_coldest_draws_are_greedy(device, temperature):
    """However small a temperature is, it must not overflow into another token."""
    logits = torch.randn(200, 50, generator=torch.Generator().manual_seed(1)) * 20
    drawn = sample(logits, device, temperatures=temperature, seeds=torch.arange(200))
    assert torch.equal(drawn, logits.argmax(-1))


@pytest.mark.parametrize("device", DEVICES)
def test_the_hottest_draws_are_uniform(device):
    logits = some_logits() * 10
    drawn = sample(logits.expand(NUM_DRAWS, -1), device, temperatures=1e9, seeds=torch.arange(NUM_DRAWS))
    check_chi_square(drawn, torch.full((VOCAB_SIZE,), 1 / VOCAB_SIZE, dtype=torch.float64))


class SimulatedRank:
    """The collectives of one of several ranks, whose offers the test carries from one to the others."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.offer: torch.Tensor | None = None
        self.best: torch.Tensor | None = None
        self.whole: torch.Tensor | None = None

    def max(self, x: torch.Tensor) -> torch.Tensor:
        self.offer = x.clone()
        return x if self.best is None else x.copy_(self.best)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return self.whole


def sample_on_ranks(logits: torch.Tensor, size: int, backend: str = "auto", **options) -> list[list[int]]:
    """What each of `size` ranks samples that hold equal parts of the vocabulary."""
    ranks = [SimulatedRank(rank, size) for rank in range(size)]
    parts = logits.chunk(size, dim=1)
    drawn = []
    for is_second_pass in (False, True):
        for rank, part in zip(ranks, parts, strict=True):
            if is_second_pass and rank.offer is not None:
                rank.best = torch.stack([other.offer for other in ranks]).amax(0)
            rank.whole = logits
            packed = Sampler(rank, backend)(part.contiguous(), *sampling_inputs(len(logits), **options))
            if is_second_pass:
                drawn.append(unpack_token_ids(packed).tolist())
    return drawn


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("offset", [100.0, 0.0, -100.0])
@pytest.mark.parametrize(
    "options", [{"temperatures": 0.0}, {"temperatures": 1.0}, {"temperatures": 0.3, "top_ks": 9}], ids=str
)
def test_ranks_agree_with_the_whole(size, offset, options):
    """Positive and negative scores, greedy and drawn, with and without filters."""
    logits = torch.randn(300, 64, generator=torch.Generator().manual_seed(2)) * 2 + offset
    options = options | {"seeds": torch.arange(300)}
    whole = sample(logits, **options).tolist()
    assert sample_on_ranks(logits, size, **options) == [whole] * size
    assert len({token_id // (64 // size) for token_id in whole}) == size, "every rank wins at times"


def test_ties_between_ranks_go_to_the_lowest_id():
    logits = torch.tensor([[0.0, 3.0, 1.0, 3.0], [-7.0, -9.0, -7.0, -7.0], [-0.0, -1.0, 0.0, -1.0], [2.0] * 4])
    whole = sample(logits, temperatures=0.0).tolist()
    assert whole[:2] == [1, 0] and whole[3] == 0
    assert sample_on_ranks(logits[[0, 1, 3]], 2, temperatures=0.0) == [[1, 0, 0]] * 2
