"""What a request should give, by the definitions of its parameters and transformers' logits, one token at a time."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
import torch
from checkpoints import EOS_TOKEN_IDS, VOCAB_SIZE, Checkpoint

from nanovllm import SamplingParams
from nanovllm.kernels.sampling import unpack_token_ids
from nanovllm.kernels.sampling_torch import sample
from nanovllm.outputs import CompletionOutput, Logprob, RequestOutput


@dataclass
class Expected:
    """A completion, and the log-probabilities of all tokens at each of its positions, and at the prompt's."""

    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = "length"
    stop_reason: int | None = None
    logprobs: list[torch.Tensor] = field(default_factory=list)
    prompt_logprobs: list[torch.Tensor] = field(default_factory=list)
    least_margin: float = float("inf")  # by which a greedy token led at least


def adjusted(logits: torch.Tensor, prompt: list[int], generated: list[int], params: SamplingParams) -> torch.Tensor:
    """Logits [V] as the parameters of a request change them."""
    x = logits.clone()
    if params.allowed_token_ids is not None:
        is_forbidden = torch.ones(len(x), dtype=torch.bool)
        is_forbidden[list(params.allowed_token_ids)] = False
        x[is_forbidden] = -torch.inf
    for token_id, bias in (params.logit_bias or {}).items():
        x[token_id] += bias
    if len(generated) < params.min_tokens:
        x[[*EOS_TOKEN_IDS, *params.stop_token_ids]] = -torch.inf
    for token_id in {*prompt, *generated}:
        x[token_id] = (
            x[token_id] / params.repetition_penalty if x[token_id] > 0 else x[token_id] * params.repetition_penalty
        )
    for token_id in set(generated):
        x[token_id] -= params.frequency_penalty * generated.count(token_id) + params.presence_penalty
    return x


def draw(logits: torch.Tensor, params: SamplingParams, seed: int | None, position: int) -> int:
    """The token drawn of logits [V]: by the plain sampler, which has tests of its own."""
    row_ints = torch.tensor([[params.top_k], [seed or 0]])
    row_floats = torch.tensor([[params.temperature], [params.top_p], [params.min_p]])
    packed = sample(
        logits[None], torch.tensor([0]), row_ints, row_floats, torch.tensor([position]), 0, params.is_filtered
    )
    return int(unpack_token_ids(packed))


@torch.inference_mode()
def complete(
    checkpoint: Checkpoint, prompt: tuple[int, ...], params: SamplingParams, seed: int | None = 0
) -> Expected:
    """A request's completion, max_len and stop strings aside."""
    expected, ids = Expected(), list(prompt)
    logits = checkpoint.model(torch.tensor([ids])).logits[0].float()
    expected.prompt_logprobs = list(logits[:-1].log_softmax(-1))
    for _ in range(params.max_tokens):
        logits = checkpoint.model(torch.tensor([ids])).logits[0, -1].float()
        x = adjusted(logits, list(prompt), ids[len(prompt) :], params)
        if params.temperature == 0:
            best = x.topk(2).values
            expected.least_margin = min(expected.least_margin, float(best[0] - best[1]))
        token_id = draw(x, params, seed, len(ids))
        expected.logprobs.append(logits.log_softmax(-1))
        expected.token_ids.append(token_id)
        ids.append(token_id)
        is_eos = token_id in EOS_TOKEN_IDS and not params.ignore_eos
        if is_eos or token_id in params.stop_token_ids:
            expected.finish_reason, expected.stop_reason = "stop", None if is_eos else token_id
            break
    return expected


def check_sample(sample: CompletionOutput, checkpoint, prompt, params, seed=None, tolerance=1e-4) -> None:
    """A sample is what the definitions say."""
    want = complete(checkpoint, prompt, params, params.seed if seed is None else seed)
    assert want.least_margin > 1e-4, "another prompt is needed: float32 decides"
    assert (sample.token_ids, sample.finish_reason) == (want.token_ids, want.finish_reason)
    assert sample.stop_reason == want.stop_reason
    assert (sample.logprobs is None) == (params.logprobs is None)
    for token_id, entry, logprobs in zip(want.token_ids, sample.logprobs or [], want.logprobs, strict=False):
        check_entry(entry, token_id, params.logprobs, logprobs, tolerance)
    if params.logprobs is not None:
        total = sum(float(lp[i]) for lp, i in zip(want.logprobs, want.token_ids, strict=True))
        assert len(sample.logprobs) == len(want.token_ids)
        assert sample.cumulative_logprob == pytest.approx(total, abs=1e-3)


def check_entry(
    entry: dict[int, Logprob], token_id: int, num_top: int, logprobs: torch.Tensor, tolerance: float = 1e-4
) -> None:
    """The logprobs of one position: the token's own first, then the best, all of them in the order of their ranks."""
    ordered = logprobs.sort(descending=True)
    best = ordered.indices[:num_top].tolist()
    assert list(entry) == [token_id, *(i for i in best if i != token_id)]
    for number, logprob in entry.items():
        assert logprob.logprob == pytest.approx(float(logprobs[number]), abs=tolerance)
        assert logprob.rank == int((logprobs > logprobs[number]).sum()) + 1


def check_prompt(result: RequestOutput, checkpoint, prompt, params, tolerance=1e-4) -> None:
    """A result's prompt_logprobs are what was asked for."""
    if params.prompt_logprobs is None:
        assert result.prompt_logprobs is None
        return
    first, *entries = result.prompt_logprobs
    assert first is None and len(entries) == len(prompt) - 1
    for token_id, entry, logprobs in zip(
        prompt[1:], entries, complete(checkpoint, prompt, params).prompt_logprobs, strict=True
    ):
        check_entry(entry, token_id, params.prompt_logprobs, logprobs, tolerance)


def random_params(rng: random.Random, max_tokens: int = 12) -> SamplingParams:
    """Parameters of a request, each asked for by some; n and what takes a tokenizer aside."""

    def maybe(value: object, default: object, share: float = 0.3) -> object:
        return value if rng.random() < share else default

    def some_ids(most: int) -> list[int]:
        return rng.sample(range(VOCAB_SIZE), rng.randint(1, most))

    num_tokens = rng.randint(1, max_tokens)
    return SamplingParams(
        temperature=rng.choice([0.0, 0.7, 1.0, 1.5]),
        top_k=maybe(rng.randint(1, 30), -1),
        top_p=maybe(rng.choice([0.5, 0.9]), 1.0),
        min_p=maybe(0.1, 0.0, 0.1),
        max_tokens=num_tokens,
        ignore_eos=rng.random() < 0.5,
        seed=rng.randrange(2**40),
        stop_token_ids=maybe(some_ids(20), None),
        presence_penalty=maybe(rng.choice([-1.5, 0.5, 2.0]), 0.0),
        frequency_penalty=maybe(rng.choice([-1.0, 0.4, 1.7]), 0.0),
        repetition_penalty=maybe(rng.choice([0.7, 1.2, 2.0]), 1.0),
        min_tokens=maybe(rng.randint(1, num_tokens), 0),
        logprobs=maybe(rng.choice([0, 1, 3, 20]), None),
        prompt_logprobs=maybe(rng.choice([0, 2]), None, 0.15),
        logit_bias=maybe({i: rng.uniform(-30, 30) for i in some_ids(9)}, None),
        allowed_token_ids=maybe(some_ids(200), None, 0.15),
    )
