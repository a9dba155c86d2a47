"""Whole engines on the kernels of GPUs, in Triton's interpreter; several ranks sum in shared memory, as GPUs do.

Every rank is a process. Small as the models are, each of the three ways to sum (packets, parts, shares) carries some
of the steps.
"""

from __future__ import annotations

from collections import Counter

import pytest
from checkpoints import Checkpoint, random_prompt
from engines import Trace, engine, tokens
from interpreter import INTERPRETED, run_in_interpreter
from sampling_oracle import check_prompt, check_sample
from shared_ranks import MAX_PART_ROWS, SharedFiles, SharingRank

from nanovllm import SamplingParams
from nanovllm.kernels import HAS_TRITON
from nanovllm.parallel import peer_memory, ranks
from nanovllm.parallel.tensor_parallel import TensorParallel

interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the interpreter's child process")
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
PROMPTS = [random_prompt(length, length) for length in (26, 3, 15)]  # which take two steps
OPTIONS = {"max_num_batched_tokens": 30, "max_model_len": 64}


def check_greedy_tokens(checkpoint: Checkpoint, **options) -> None:
    with engine(checkpoint.path, **OPTIONS, **options) as llm:
        trace = Trace(llm)
        results = llm.generate([list(prompt) for prompt in PROMPTS], GREEDY, use_tqdm=False)
        assert tokens(results) == [checkpoint.greedy(prompt, 6, True) for prompt in PROMPTS]
        assert trace.num_chunks > 0


@interpreted
def test_greedy_tokens_of_one_rank(checkpoint):
    """Decodes take the fused kernels for few rows, prompts the others."""
    check_greedy_tokens(checkpoint("qwen3"))


@interpreted
def test_options_of_one_rank(checkpoint):
    """Adjusted logits, and logprobs of what is sampled and of a prompt, by the kernels."""
    checkpoint = checkpoint("qwen3")
    params = [
        SamplingParams(seed=1, max_tokens=4, logprobs=2, prompt_logprobs=2, repetition_penalty=1.3, min_tokens=3),
        SamplingParams(temperature=0, max_tokens=4, logit_bias={9: 3.0, 50: -4}, frequency_penalty=0.7, logprobs=0),
        SamplingParams(seed=3, max_tokens=3, top_k=9, allowed_token_ids=list(range(100)), presence_penalty=-1.0),
    ]
    with engine(checkpoint.path, **OPTIONS) as llm:
        results = llm.generate([list(prompt) for prompt in PROMPTS], params, use_tqdm=False)
    for result, prompt, param in zip(results, PROMPTS, params, strict=True):
        check_sample(result.outputs[0], checkpoint, prompt, param)
        check_prompt(result, checkpoint, prompt, param)


@interpreted
@pytest.mark.parametrize(("family", "num_ranks"), [("qwen2_moe", 2), ("mistral", 4), ("gemma2", 2)])
def test_greedy_tokens_of_several_ranks(checkpoint, monkeypatch, tmp_path, family, num_ranks):
    sharing = SharingRank(tmp_path)
    monkeypatch.setattr(ranks, "run_rank", sharing)
    monkeypatch.setattr(peer_memory, "MAX_PART_ROWS", MAX_PART_ROWS)
    monkeypatch.setattr(TensorParallel, "connect", TensorParallel.connect)
    sharing.set_up()
    forms: Counter[str] = Counter()
    next_peers = SharedFiles.next_peers

    def counted_next_peers(memory: SharedFiles, rows: int, max_packet_rows: int):
        peers = next_peers(memory, rows, max_packet_rows)
        forms[peers.form] += 1
        return peers

    monkeypatch.setattr(SharedFiles, "next_peers", counted_next_peers)
    check_greedy_tokens(checkpoint(family), tensor_parallel_size=num_ranks)
    assert min(forms[form] for form in ("packets", "parts", "shares")) > 0, forms


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED or not HAS_TRITON, reason="the parent process runs it, with triton")
def test_in_the_interpreter():
    run_in_interpreter(__file__)
