"""Both samplers, Triton's and plain torch (compiled or not), draw alike, and pack a draw in the same form.

The kernels run on the GPU where there is one, and in Triton's interpreter, in a child process.
"""

from __future__ import annotations

import itertools
import math
import struct

import pytest
import torch
from checkpoints import mixed_prompts
from engines import engine, generate
from interpreter import DEVICE, INTERPRETED, kernel_test, plain_test, run_in_interpreter
from test_sampler import SimulatedRank, sample, sample_on_ranks, sampling_inputs

from nanovllm import SamplingParams
from nanovllm.config import Config
from nanovllm.engine.step_input import StepShape
from nanovllm.kernels import HAS_TRITON
from nanovllm.kernels import sampling as kernels
from nanovllm.kernels import sampling_torch as plain
from nanovllm.kernels.decode_rows import store_tokens, store_tokens_torch
from nanovllm.kernels.sampling import unpack_token_ids
from nanovllm.layers.sampler import Sampler


@plain_test
@pytest.mark.slow
@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
def test_in_the_interpreter():
    run_in_interpreter(__file__)


# ---- the option ---------------------------------------------------------------------------------------------------


@plain_test
def test_the_option(checkpoint):
    path = checkpoint("qwen3").path
    assert Config(path, device="cpu").sampler_backend == "torch"
    assert Config(path, device="cpu", sampler_backend="torch").sampler_backend == "torch"
    with pytest.raises(ValueError, match=r"^sampler_backend='triton' needs device='cuda', got 'cpu'$"):
        Config(path, device="cpu", sampler_backend="triton")
    with pytest.raises(ValueError, match="sampler_backend must be one of auto, triton, torch, got 'cuda'"):
        Config(path, device="cpu", sampler_backend="cuda")


@plain_test
def test_the_device_decides_where_nothing_is_said():
    sampler = Sampler(SimulatedRank(0, 1))
    sampler(torch.zeros(1, 8, device=DEVICE), *sampling_inputs(1, DEVICE))
    assert sampler.sample is (kernels.sample if DEVICE == "cuda" else plain.sample)


# ---- equal draws --------------------------------------------------------------------------------------------------


def mixed_batch(num_rows: int, vocab_size: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Greedy, plain and filtered rows, and some without a token: of NaN, of infinity, of minus infinity alone."""
    torch.manual_seed(num_rows)
    n = torch.arange(num_rows)
    logits = torch.randn(num_rows, vocab_size) * 3
    logits[n % 23 == 5, vocab_size // 3] = math.nan
    logits[n % 23 == 9, vocab_size - 1] = math.inf
    logits[n % 23 == 14] = -math.inf
    logits[n % 23 == 18, ::2] = -math.inf
    options = {
        "temperatures": torch.tensor([0.0, 0.7, 1.0, 1.5, 1.0, 0.9, 3.0])[n % 7],
        "top_ks": torch.tensor([-1, 0, 5, 300, 10**6])[n % 5],
        "top_ps": torch.tensor([1.0, 0.9, 0.5, 1.0])[n % 4],
        "min_ps": torch.tensor([0.0, 0.0, 0.1])[n % 3],
        "seeds": torch.randint(-(2**63), 2**63 - 1, (num_rows,)),
        "positions": torch.randint(0, 40_000, (num_rows,)),
    }
    return logits, options


def unfiltered(options: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: options[name] for name in ("temperatures", "seeds", "positions")}


@kernel_test
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_filtered", [False, True])
def test_both_draw_alike(is_filtered, dtype):
    logits, options = mixed_batch(46, 5000)
    if not is_filtered:
        options = unfiltered(options)
    drawn, expected = (sample(logits.to(dtype), DEVICE, backend, **options) for backend in ("triton", "torch"))
    assert drawn.tolist() == expected.tolist()
    assert (drawn == -1).sum() == 6 and drawn.unique().numel() > 30


@kernel_test
@pytest.mark.skipif(not INTERPRETED, reason="the simulated ranks are on the CPU")
@pytest.mark.parametrize("is_filtered", [False, True])
def test_both_draw_alike_on_two_ranks(is_filtered):
    logits, options = mixed_batch(24, 1000)
    if not is_filtered:
        options = unfiltered(options)
    whole = sample(logits, DEVICE, "torch", **options).tolist()
    for backend in ("triton", "torch"):
        assert sample_on_ranks(logits, 2, backend, **options) == [whole] * 2


# ---- torch.compile ------------------------------------------------------------------------------------------------


def num_graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@plain_test
@pytest.mark.slow  # compiling takes a minute
@torch.inference_mode()
def test_compiled_draws_are_the_plain_ones():
    """For batches of all sizes, on two ranks too, after the cases that `Sampler` compiles at its first call."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    logits, options = mixed_batch(64, 1000)
    rows, row_ints, row_floats, positions, _ = sampling_inputs(64, **options)
    for size in (1, 2):
        samplers = [Sampler(SimulatedRank(rank, size), "torch") for rank in range(size)]
        for sampler in samplers:
            sampler.choose = lambda logits: plain.compiled_sample  # as on CUDA
            sampler.tp.all_gather = lambda part: logits[: len(part)]
        num_compiled = None
        for num_rows, case, is_view in itertools.product((64, 1, 2, 7, 33), (True, False), (True, False)):
            # Positions are a part of a tensor with others where all rows decode, and else one of their own.
            place = torch.stack([positions[:num_rows]] * 3)[2] if is_view else positions[:num_rows].clone()
            arguments = rows[:num_rows], row_ints, row_floats, place
            parts = logits[:num_rows].chunk(size, dim=1)
            offers = [
                sampler(part.contiguous(), *arguments, case) for sampler, part in zip(samplers, parts, strict=True)
            ]
            expected = plain.sample(logits[:num_rows], *arguments, 0, case)
            assert torch.equal(unpack_token_ids(torch.stack(offers).amax(0)), unpack_token_ids(expected))
            num_compiled = num_compiled or num_graphs()  # that is, after the first call
        assert num_graphs() == num_compiled
    assert not torch._dynamo.utils.counters["graph_break"]


@plain_test
@pytest.mark.slow  # as above
def test_an_engine_compiles_at_its_first_step_only(checkpoint, monkeypatch):
    """Whatever shapes come later, and wherever their tensors come from: nothing can be compiled within a capture."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(Sampler, "choose", lambda self, logits: plain.compiled_sample)  # as on CUDA
    params = [SamplingParams(seed=seed, top_k=seed % 3 * 5, max_tokens=6, ignore_eos=True) for seed in range(12)]
    with engine(checkpoint("qwen3").path, max_num_seqs=16) as llm:
        rows, forward = llm.ranks.runner.rows, torch.inference_mode()(llm.ranks.runner._forward)
        rows.decode_rows.fill_(rows.padding_row)
        forward(StepShape(16, num_prompts=0, num_tokens=0, is_filtered=False))  # as warmup_model does
        num_compiled = num_graphs()
        for size, is_filtered in itertools.product((16, 8, 2, 1), (False, True)):
            forward(StepShape(size, num_prompts=0, num_tokens=0, is_filtered=is_filtered))
        rows.device_step_count.zero_()
        results = generate(llm, mixed_prompts(), params)  # prompts together, then decodes
        alone = [generate(llm, [prompt], param)[0] for prompt, param in zip(mixed_prompts(), params, strict=True)]
    assert [result["token_ids"] for result in results] == [result["token_ids"] for result in alone]
    assert num_graphs() == num_compiled == 4


@pytest.mark.gpu
@torch.inference_mode()
def test_compiled_draws_in_a_cuda_graph():
    """The first call compiles all cases; captures of batches of other sizes then compile nothing."""
    torch._dynamo.reset()
    logits, options = mixed_batch(64, 151_936)
    logits = logits.to("cuda", torch.bfloat16)
    rows, row_ints, row_floats, positions, _ = sampling_inputs(64, "cuda", **options)
    sampler = Sampler(SimulatedRank(0, 1), "torch")
    sampler.tp.all_gather = lambda x: x
    sampler(logits, rows, row_ints, row_floats, positions, False)
    count = num_graphs()
    for num_rows, case in itertools.product((64, 1, 2, 7, 33), (False, True)):
        arguments = logits[:num_rows].clone(), rows[:num_rows], row_ints, row_floats, positions[:num_rows].clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="relaxed"):
            packed = sampler(*arguments, case)
        for shift in range(3):  # the graph reads what is there when it is replayed
            arguments[0].copy_(logits[shift : shift + num_rows] if num_rows < 60 else logits.roll(shift, 0))
            arguments[4].copy_(positions[:num_rows] + shift)
            graph.replay()
            expected = plain.sample(*arguments, 0, case)
            assert torch.equal(unpack_token_ids(packed), unpack_token_ids(expected)), (num_rows, case, shift)
    assert num_graphs() == count, "something was compiled within a capture"


NUM_STEPS = 16


@pytest.mark.gpu
@pytest.mark.parametrize("is_filtered", [False, True])
@torch.inference_mode()
def test_thousands_of_draws_on_a_gpu(is_filtered):
    """The rare ones that differ hang on the last bits of two scores, or of the mass at the border of a top-p."""
    torch.manual_seed(0)
    num_rows = 256
    _, options = mixed_batch(num_rows, 10)
    if not is_filtered:
        options = unfiltered(options)
    logits = (torch.randn(num_rows, 151_936, device="cuda") * 3).bfloat16()
    triton, compiled = (Sampler(SimulatedRank(0, 1), backend) for backend in ("triton", "torch"))
    triton.tp.all_gather = compiled.tp.all_gather = lambda x: x
    num_equal = 0
    for step in range(NUM_STEPS):
        options["positions"] = torch.arange(num_rows) * 100 + step
        inputs = sampling_inputs(num_rows, "cuda", **options)
        rows, (top_k, seeds), (temperature, top_p, min_p), positions, _ = inputs
        ours, theirs = (unpack_token_ids(sampler(logits, *inputs)) for sampler in (triton, compiled))
        num_equal += int((ours == theirs).sum())
        thresholds = [
            module.filter_thresholds(logits, rows, temperature, top_k, top_p, min_p) for module in (kernels, plain)
        ]
        for row in (ours != theirs).nonzero()[:, 0].tolist():
            pair = torch.stack([ours[row], theirs[row]])
            noise = plain.gumbel_noise(seeds[row, None].cpu(), positions[row, None].cpu(), pair.cpu())[0]
            scores = (logits[row, pair].double() / temperature[row]).cpu() + noise
            is_at_a_border = any((logits[row, pair] < low[row]).any() for low in thresholds)
            assert is_at_a_border or (scores[0] - scores[1]).abs() <= 1e-5 * scores.abs().max().clamp(min=1)
    assert num_equal >= 0.999 * num_rows * NUM_STEPS


@pytest.mark.gpu
@pytest.mark.parametrize("enforce_eager", [False, True], ids=["graphs", "eager"])
def test_engines_with_either_generate_alike(checkpoint, enforce_eager):
    """Greedy, plain and filtered requests, of a float32 model."""
    prompts = mixed_prompts()
    params = [
        SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, seed=7, max_tokens=16, ignore_eos=True)
        for (temperature, top_k, top_p), _ in zip(
            itertools.cycle([(0.0, -1, 1.0), (0.8, -1, 1.0), (1.2, 40, 0.9)]), prompts, strict=False
        )
    ]
    options = {"device": "cuda", "dtype": "float32", "gpu_memory_utilization": 0.5, "enforce_eager": enforce_eager}
    results = []
    for backend in ("triton", "torch"):
        with engine(checkpoint("qwen3").path, **options, sampler_backend=backend) as llm:
            assert llm.config.sampler_backend == backend
            plain_ids = [result["token_ids"] for result in generate(llm, prompts, params[:2] * (len(prompts) // 2))]
            results.append(plain_ids + [result["token_ids"] for result in generate(llm, prompts, params)])
    assert sum(a == b for a, b in zip(*results, strict=True)) >= len(results[0]) - 1


# ---- the packed form of a draw ------------------------------------------------------------------------------------

LARGEST = struct.unpack("f", struct.pack("I", 0x7F7FFFFF))[0]
DENORMAL = struct.unpack("f", struct.pack("I", 1))[0]
SCORES = [-math.inf, -LARGEST, -1.5, -DENORMAL, -0.0, 0.0, DENORMAL, 1.5, LARGEST, math.inf, math.nan, -math.nan]
TOKEN_IDS = [0, 1, 151_935, 2**31 - 2]


def packed_by_definition(score: float, token_id: int) -> int:
    """In Python's numbers: floats order as their bits do, negative ones in reverse; NaN counts as infinite."""
    (bits,) = struct.unpack("I", struct.pack("f", math.inf if math.isnan(score) else score))
    order = bits if bits < 2**31 else (0xFFFFFFFF - bits) - 2**31
    return order * 2**32 + 0x7FFFFFFF - token_id


def packed_draws(draw, device: str) -> list[int]:
    """What `draw` packs of greedy rows with one logit each."""
    zeros = torch.zeros(len(SCORES), dtype=torch.int64, device=device)
    logits = torch.tensor(SCORES, device=device)[:, None]
    drawn = [draw(logits, zeros, zeros.float(), zeros, zeros, start) for start in TOKEN_IDS]
    return torch.stack(drawn, dim=1).flatten().tolist()


PAIRS = list(itertools.product(SCORES, TOKEN_IDS))
PACKED = [packed_by_definition(score, token_id) for score, token_id in PAIRS]
UNPACKED = [token_id if math.isfinite(score) else -1 for score, token_id in PAIRS]


def stored_tokens(store, device: str) -> tuple[list[int], list[int]]:
    """What `store` writes for the device and for the host."""
    rows = torch.arange(len(PACKED), device=device)
    last_tokens = torch.full((len(PACKED),), -5, device=device)
    ring = torch.full((2, len(PACKED)), -5, pin_memory=device == "cuda")
    store(torch.tensor(PACKED, device=device), rows, last_tokens, ring, torch.tensor([1], device=device))
    if device == "cuda":
        torch.cuda.synchronize()
    return last_tokens.tolist(), ring[1].tolist()


STORED = [max(token_id, 0) for token_id in UNPACKED], UNPACKED


@plain_test
def test_the_packed_form_in_torch():
    assert packed_draws(plain.draw, "cpu") == PACKED
    assert unpack_token_ids(torch.tensor(PACKED)).tolist() == UNPACKED
    assert stored_tokens(store_tokens_torch, "cpu") == STORED


@kernel_test
def test_the_packed_form_in_kernels():
    assert packed_draws(kernels.draw, DEVICE) == PACKED
    assert unpack_token_ids(torch.tensor(PACKED, device=DEVICE)).tolist() == UNPACKED
    assert stored_tokens(store_tokens, DEVICE) == STORED


@plain_test
def test_the_packed_form_orders_draws():
    """What the maximum over ranks relies on: better scores first, then lower ids; and -1 is no draw."""
    assert -1 not in PACKED
    for (score, token_id), packed in zip(PAIRS, PACKED, strict=True):
        for (other_score, other_id), other in zip(PAIRS, PACKED, strict=True):
            if score > other_score or (score == other_score != 0 and token_id < other_id):
                assert packed > other


@plain_test
def test_bits_of_nan_are_no_token():
    """Nor do scores that are NaN by their bits, whatever `draw` makes of them, unpack to one."""
    bits = torch.tensor([0x7FC00000, 0x7F800001, 0xFFC00000 - 2**32, 0xFF800001 - 2**32])
    packed = kernels.pack_draw(kernels.flip(bits), torch.tensor(5))
    assert unpack_token_ids(packed).tolist() == [-1] * 4
