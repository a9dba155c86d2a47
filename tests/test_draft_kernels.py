"""What a step does with drafts: each kernel equals its torch function, in the interpreter (a child process), on a GPU.

And the torch functions equal what is said of them, word by word in plain Python.
"""

from __future__ import annotations

import random

import pytest
import torch
from interpreter import DEVICE, INTERPRETED, kernel_test, plain_test, run_in_interpreter

from nanovllm.kernels import HAS_TRITON, ngrams
from nanovllm.kernels.ngrams import propose_ngrams, propose_ngrams_torch
from nanovllm.kernels.verify_rows import (
    NUM_CHECKED,
    NUM_PROPOSED,
    NUM_TOKENS,
    REPORT_HEAD,
    lay_out_drafts,
    lay_out_drafts_torch,
    store_verified,
    store_verified_torch,
)

RING_SIZE, MAX_LEN = 4, 700
NO_TOKEN = 0x7F800000  # the order of an infinite score


def ints(*values: int, dtype: torch.dtype = torch.int32, device: str = DEVICE) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


def pack(token_ids: torch.Tensor) -> torch.Tensor:
    """Draws of these tokens, -1: none."""
    order = torch.where(token_ids < 0, NO_TOKEN, 5)
    return (order << 32) | (0x7FFFFFFF - token_ids.clamp(min=0))


# ---- lay_out_drafts -------------------------------------------------------------------------------------------------


def layouts() -> dict[str, torch.Tensor]:
    """Six rows, of which the last one is the padding row; the fourth stands short of the end."""
    generator = torch.Generator().manual_seed(0)
    return {
        "last_tokens": torch.randint(1000, (6,), generator=generator),
        "drafts": torch.randint(1000, (6, 4), generator=generator, dtype=torch.int32),
        "context_lens": ints(0, 15, 30, 61, 63, 0, device="cpu"),
        "block_tables": torch.randint(99, (6, 4), generator=generator, dtype=torch.int32),
    }


@kernel_test
@pytest.mark.parametrize("num_drafts", [1, 2, 4])
def test_lay_out_drafts(num_drafts):
    rows = ints(3, 1, 4, 0, 5, 5, dtype=torch.int64)
    state = {name: value.to(DEVICE) for name, value in layouts().items()}
    twin = layouts()
    result = lay_out_drafts(rows, **state, block_size=16, num_drafts=num_drafts, max_len=64)
    expected = lay_out_drafts_torch(rows.cpu(), **twin, block_size=16, num_drafts=num_drafts, max_len=64)
    for name in result._fields:
        a, b = getattr(result, name), getattr(expected, name)
        assert (a.tolist(), a.dtype) == (b.tolist(), b.dtype), name
    assert state["context_lens"].tolist() == twin["context_lens"].tolist()


@plain_test
def test_what_is_laid_out():
    """Row by row the last token and its drafts, as rows that decode; nothing is stored of padding, nor at the end."""
    state = layouts()
    tables = state["block_tables"].tolist()
    rows = ints(3, 1, 5, dtype=torch.int64, device="cpu")
    inputs = lay_out_drafts_torch(rows, **state, block_size=16, num_drafts=3, max_len=64)
    last, drafts = state["last_tokens"].tolist(), state["drafts"].tolist()
    assert inputs.tokens.tolist() == [token for row in (3, 1, 5) for token in (last[row], *drafts[row][:3])]
    assert inputs.positions.tolist() == [61, 62, 63, 63, 15, 16, 17, 18, 0, 1, 2, 3]
    assert inputs.context_lens.tolist() == [62, 63, 64, 64, 16, 17, 18, 19, 0, 0, 0, 0]
    of_3, of_1 = (tables[3][3] * 16, tables[1][0] * 16)
    slots = [
        of_3 + 13,
        of_3 + 14,
        of_3 + 15,
        -1,
        of_1 + 15,
        *(tables[1][1] * 16 + i for i in range(3)),
        -1,
        -1,
        -1,
        -1,
    ]
    assert inputs.slots.tolist() == slots
    assert inputs.block_tables.tolist() == [tables[row] for row in (3, 1, 5) for _ in range(4)]
    assert state["context_lens"].tolist() == [0, 16, 30, 62, 63, 0]


# ---- store_verified -------------------------------------------------------------------------------------------------


class Stored:
    """Rows that drafts were checked of, before and after; all is on one device."""

    def __init__(self, num_rows: int, num_drafts: int, device: str, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.drafts = torch.randint(3, (num_rows, 4), generator=generator, dtype=torch.int32).to(device)
        self.num_drafts = torch.randint(5, (num_rows,), generator=generator, dtype=torch.int32).to(device)
        self.history = torch.full((num_rows, MAX_LEN), -7, dtype=torch.int32, device=device)
        self.last_tokens = torch.full((num_rows,), -7, device=device)
        self.context_lens = torch.randint(MAX_LEN + 1, (num_rows,), generator=generator, dtype=torch.int32)
        self.context_lens[::3] = MAX_LEN - 2
        self.context_lens[-1] = 0
        self.context_lens = self.context_lens.to(device)
        self.ring = torch.full((RING_SIZE, num_rows, REPORT_HEAD + 5), -7, pin_memory=device == "cuda")
        self.count = torch.tensor([6], device=device)
        rows = torch.randperm(num_rows - 1, generator=generator)[: num_rows // 2]
        self.rows = torch.cat([rows, torch.tensor([num_rows - 1] * 2)]).to(device)
        self.draws = torch.randint(-1, 3, (len(self.rows), 1 + num_drafts), generator=generator)
        is_draft = torch.rand(self.draws[:, 1:].shape, generator=generator) < 0.7
        self.draws[:, :-1] = torch.where(is_draft, self.drafts.cpu()[self.rows.cpu(), :num_drafts], self.draws[:, :-1])
        self.draws[-1] = self.draws[-2]  # both of the padding row
        self.packed = pack(self.draws).flatten().to(device)

    def store(self, function) -> Stored:
        names = ["packed", "rows", "drafts", "num_drafts", "history", "last_tokens", "context_lens", "ring", "count"]
        function(*(getattr(self, name) for name in names), MAX_LEN)
        return self

    @property
    def state(self) -> dict[str, list]:
        """Of the rows without the padding row, whose history does not matter."""
        values = {name: getattr(self, name)[:-1].tolist() for name in ("history", "last_tokens")}
        values |= {name: getattr(self, name).tolist() for name in ("context_lens", "count", "num_drafts", "drafts")}
        return values | {"ring": self.ring[:, :-1].tolist()}


@kernel_test
@pytest.mark.parametrize("num_drafts", [0, 1, 4])
@pytest.mark.parametrize("num_rows", [3, 9, 300])
def test_store_verified(num_rows, num_drafts):
    stored = Stored(num_rows, num_drafts, DEVICE, seed=num_rows).store(store_verified).state
    assert stored == Stored(num_rows, num_drafts, "cpu", seed=num_rows).store(store_verified_torch).state


@plain_test
@pytest.mark.parametrize("num_drafts", [0, 1, 4])
def test_what_is_stored(num_drafts):
    before = Stored(200, num_drafts, "cpu", seed=1)
    after = Stored(200, num_drafts, "cpu", seed=1).store(store_verified_torch)
    assert after.count.tolist() == [7] and after.context_lens[-1] == 0
    all_accepted = []
    for row, draws in zip(before.rows.tolist()[:-2], before.draws.tolist()[:-2], strict=True):
        checked = min(int(before.num_drafts[row]), num_drafts)
        accepted = 0
        while accepted < checked and draws[accepted] == before.drafts[row, accepted]:
            accepted += 1
        all_accepted.append(accepted)
        kept, start = draws[: 1 + accepted], int(before.context_lens[row])
        report = after.ring[6 % RING_SIZE, row].tolist()
        assert (report[NUM_TOKENS], report[NUM_CHECKED]) == (1 + accepted, checked)
        assert report[REPORT_HEAD : REPORT_HEAD + 1 + accepted] == kept
        assert int(after.context_lens[row]) == start + accepted
        assert int(after.last_tokens[row]) == max(kept[-1], 0)
        text = ([-7] * start + [max(token_id, 0) for token_id in kept])[:MAX_LEN]
        assert after.history[row].tolist() == text + [-7] * (MAX_LEN - len(text))
    assert set(all_accepted) == set(range(num_drafts + 1))
    others = sorted(set(range(199)) - set(before.rows.tolist()))
    assert after.context_lens[others].tolist() == before.context_lens[others].tolist()


# ---- propose_ngrams -------------------------------------------------------------------------------------------------


class Texts:
    """Texts of few distinct tokens, one a row, and the drafts that are looked up for them."""

    def __init__(self, texts: list[list[int]], most: int, device: str) -> None:
        num_rows = len(texts) + 1
        self.history = torch.full((num_rows, MAX_LEN), 1, dtype=torch.int32)  # arbitrary behind a text's end
        for row, text in enumerate(texts):
            self.history[row, : len(text)] = torch.tensor(text)
        self.history = self.history.to(device)
        self.context_lens = ints(*(len(text) - 1 for text in texts), 0, device=device)
        self.drafts = torch.zeros(num_rows, most, dtype=torch.int32, device=device)
        self.num_drafts = torch.full((num_rows,), -7, dtype=torch.int32, device=device)
        self.ring = torch.full((RING_SIZE, num_rows, REPORT_HEAD + 1 + most), -7, pin_memory=device == "cuda")
        self.count = torch.tensor([7], device=device)
        self.rows = torch.tensor([*range(len(texts)), num_rows - 1, num_rows - 1], device=device)

    def propose(self, function, shortest: int, longest: int, max_len: int = MAX_LEN) -> list[list[int]]:
        """The drafts of each row, after checks of what else was written."""
        names = ["rows", "history", "context_lens", "drafts", "num_drafts", "ring", "count"]
        function(*(getattr(self, name) for name in names), shortest, longest, max_len)
        numbers = self.num_drafts.tolist()
        assert self.ring[6 % RING_SIZE, :, NUM_PROPOSED].tolist() == numbers and numbers[-1] == 0
        return [row[:number] for row, number in zip(self.drafts.tolist(), numbers, strict=True)][:-1]


def looked_up(text: list[int], most: int, shortest: int, longest: int, max_len: int = MAX_LEN) -> list[int]:
    """The definition: n-grams from the longest on, each from its latest occurrence on."""
    for size in range(min(longest, len(text) - 1), shortest - 1, -1):
        for start in range(len(text) - size - 1, -1, -1):
            if text[start : start + size] == text[-size:]:
                copy = list(text)
                for i in range(most):
                    copy.append(copy[start + size + i])
                return copy[len(text) :][: max(max_len - 1 - len(text), 0)]
    return []


def some_texts() -> list[list[int]]:
    draw = random.Random(0)
    texts = [[draw.randrange(vocab) for _ in range(n)] for vocab in (2, 5, 40) for n in (1, 2, 3, 9, 50, 300, 690)]
    loop = [3, 1, 4, 1, 5]
    return [*texts, [7] * 5, loop * 3, loop * 2 + loop[:1], list(range(20)), [9] * MAX_LEN, [9] * (MAX_LEN - 2)]


@kernel_test
@pytest.mark.parametrize(("most", "shortest", "longest"), [(1, 1, 1), (5, 2, 4), (4, 5, 5), (31, 1, 3)])
@pytest.mark.parametrize("block", [64, 1024])
def test_propose_ngrams(monkeypatch, most, shortest, longest, block):
    monkeypatch.setattr(ngrams, "LOOKUP_BLOCK", block)
    drafts = Texts(some_texts(), most, DEVICE).propose(propose_ngrams, shortest, longest)
    assert drafts == Texts(some_texts(), most, "cpu").propose(propose_ngrams_torch, shortest, longest)


@plain_test
@pytest.mark.parametrize(("most", "shortest", "longest"), [(1, 1, 1), (5, 2, 4), (4, 5, 5), (31, 1, 3)])
def test_what_is_proposed(most, shortest, longest):
    texts = some_texts()
    drafts = Texts(texts, most, "cpu").propose(propose_ngrams_torch, shortest, longest)
    assert drafts == [looked_up(text, most, shortest, longest) for text in texts]
    assert {len(row) for row in drafts} >= {0, 1, most}


@plain_test
def test_a_loop_is_continued_and_a_text_in_surplus_gets_nothing():
    texts = Texts([[8, 1, 2, 1, 2, 1], [5] * MAX_LEN, [5] * (MAX_LEN - 1)], most=4, device="cpu")
    texts.context_lens[1] = MAX_LEN  # as if its surplus token were stored
    assert texts.propose(propose_ngrams_torch, 1, 3) == [[2, 1, 2, 1], [], []]
    assert Texts([[5] * 8], 4, "cpu").propose(propose_ngrams_torch, 1, 3, max_len=10) == [[5]]


@pytest.mark.skipif(INTERPRETED or not HAS_TRITON, reason="starts the child process")
def test_in_the_interpreter():
    assert "20 passed" in run_in_interpreter(__file__)
