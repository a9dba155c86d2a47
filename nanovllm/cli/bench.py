"""`nanovllm bench`: bench.py, which is a part of the sources and of no wheel."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import nanovllm

ROOT = Path(nanovllm.__file__).parents[1]


def run_bench(arguments: list[str]) -> int:
    """Runs bench.py with these arguments; returns its exit status.

    Raises:
        RuntimeError: the package was installed from a wheel.
    """
    script = ROOT / "bench.py"
    if not (script.is_file() and (ROOT / "tools" / "step_profile.py").is_file()):
        raise RuntimeError(
            f"bench.py and tools/ are in the sources alone, and {ROOT} has none: clone the repository or unpack the "
            "sdist, and run `python bench.py` there, with the package installed as it is"
        )
    return subprocess.call([sys.executable, str(script), *arguments])
