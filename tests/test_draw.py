"""The drawing kernel equals its torch function: in the interpreter, in a child process, and on a GPU."""

import os
import subprocess
import sys

import pytest
import torch

from nanovllm.kernels import HAS_TRITON
from nanovllm.kernels.draw import draw, draw_torch, unpack_token_ids

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"


def score(packed):
    """The float32 scores in what `draw` returns; the tests' winners are positive."""
    return (packed >> 32).int().view(torch.float32)


MARKS = [] if INTERPRETED else [pytest.mark.gpu, pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU")]


@pytest.mark.parametrize("marked", [pytest.param(None, marks=MARKS)])
@pytest.mark.parametrize("vocab_size", [50, 4096, 20000, 33000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_equals_torch(vocab_size, dtype, marked):
    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randn(5, vocab_size, generator=generator).to(dtype).to(DEVICE)
    temperatures = torch.tensor([0.0, 1.0, 0.6, 0.0, 3.0], device=DEVICE)
    seeds = torch.tensor([1, 2**40 + 7, -5, 0, 2**62], device=DEVICE)
    positions = torch.tensor([0, 1, 77, 4095, 131071], device=DEVICE)
    packed = draw(logits, temperatures, seeds, positions, start=1000)
    expected = draw_torch(logits, temperatures, seeds, positions, start=1000)
    assert unpack_token_ids(packed).tolist() == unpack_token_ids(expected).tolist()
    torch.testing.assert_close(score(packed), score(expected), rtol=1e-5, atol=1e-4)


@pytest.mark.skipif(INTERPRETED or not HAS_TRITON, reason="starts the child process")
def test_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    child = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert child.returncode == 0, child.stdout
    assert "9 passed" in child.stdout


def test_equal_scores_go_to_the_lowest_id():
    zeros = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    logits = torch.tensor([[-3.0, -1.0, -1.0, -2.0]], device=DEVICE)
    assert unpack_token_ids(draw(logits, zeros.float(), zeros, zeros)).tolist() == [1]
