"""Requests of any parameters, batched in engines of any kind, give what each of them gives alone."""

from __future__ import annotations

import importlib.util

import pytest
from params_fuzz import MOST_ROUNDED, fuzz


def check(num_requests: int, seed: int, **options) -> None:
    counts, wrong = fuzz(num_requests, seed, **options)
    assert not wrong, wrong[0]
    assert counts["decided by rounding"] <= MOST_ROUNDED * counts["samples"]
    for what in ("preemptions", "chunks", "hits", "stop", "stopped by words", "length"):
        assert counts[what] > 0, f"the seed does not show {what}"


def test_a_few():
    """Without structures, whose compilation decides when a request begins: the seed must show what it shows."""
    check(24, seed=12, has_structures=False, requests_of_an_engine=8)


@pytest.mark.slow
def test_many():
    """Ranks of two among the engines. A new seed finds more: run tests/params_fuzz.py by hand."""
    check(600, seed=1, has_structures=importlib.util.find_spec("xgrammar") is not None)
