"""Runs a file of kernel tests in the interpreter, in a child: it must be asked for before triton is imported."""

import os
import subprocess
import sys

import pytest
import torch

from nanovllm.kernels import INTERPRETED

DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"


def kernel_test(test):
    """Runs a test in the interpreter's child process, and on a GPU."""
    return test if INTERPRETED else pytest.mark.gpu(test)


def plain_test(test):
    """Runs a test without kernels once: not in the child process."""
    return pytest.mark.skipif(INTERPRETED, reason="the parent process runs it")(test)


def run_in_interpreter(path: str) -> str:
    """What pytest prints for the file; its tests must all pass."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", path]
    child = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stdout[-5000:]
    assert " passed" in child.stdout
    return child.stdout
