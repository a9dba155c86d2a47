"""A minute of tests/soak.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.timeout(120)
@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--ranks=2"], ["--stages=2"]], ids=str)
def test_soak(options):
    """In a process of its own, which gets interrupts. A new seed finds more: run it by hand."""
    script = Path(__file__).parent / "soak.py"
    command = [sys.executable, script, "--seconds", "30", "--seed", "7", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr[-5000:]
    parts = (part.split(" ", 1) for part in done.stdout.split(": ")[2].split(", "))
    counts = {name.strip(): int(number) for number, name in parts}
    assert counts["finished"] > 0 and counts["aborted"] > 0  # refusals are rarer
