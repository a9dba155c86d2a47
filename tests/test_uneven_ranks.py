"""Several ranks where heads, vocabulary or intermediate sizes do not divide by them: equal to transformers."""

from __future__ import annotations

import pytest
import torch
from checkpoints import EXPERTS, SHAPE, Checkpoint, mixed_prompts, random_prompt
from engines import engine, expected, generate, tokens
from sampling_oracle import check_prompt, check_sample, complete
from transformers import LlamaConfig, Olmo2Config, Qwen2MoeConfig, Qwen3Config

from nanovllm import LLM, SamplingParams

ODD = SHAPE | {"vocab_size": 321, "intermediate_size": 97, "num_key_value_heads": 1}
MODELS = {
    "tied": lambda: Qwen3Config(**ODD, head_dim=32, tie_word_embeddings=True),
    "biased": lambda: LlamaConfig(
        **ODD | {"num_key_value_heads": 2}, attention_bias=True, mlp_bias=True, tie_word_embeddings=False
    ),
    "normalised heads": lambda: Olmo2Config(**ODD),
    "sparse": lambda: Qwen2MoeConfig(
        **ODD | EXPERTS | {"moe_intermediate_size": 41},
        num_experts=5,
        shared_expert_intermediate_size=57,
        experts_implementation="eager",  # transformers' other one has no odd sizes
    ),
}
SEEDS = {"tied": 2, "biased": 3, "sparse": 5, "normalised heads": 4}  # chosen as that of tests/checkpoints.py
PROMPTS = [random_prompt(length, length, 321) for length in (30, 5, 61)]
REQUESTS = {
    "plain": {"temperature": 1.0},
    "filtered": {"temperature": 1.2, "top_k": 40, "top_p": 0.9, "min_p": 0.01},
    "all tokens": {"temperature": 1.5, "top_k": 321},
    "penalties": {"temperature": 0, "presence_penalty": 0.7, "frequency_penalty": 0.4, "repetition_penalty": 1.3},
    "last token": {"temperature": 0, "logit_bias": {320: 100.0}},
    "allowed": {"temperature": 1.0, "allowed_token_ids": [3, 160, 161, 319, 320], "top_p": 0.9},
    "logprobs": {"temperature": 0.7, "logprobs": 5, "prompt_logprobs": 5},
}


@pytest.fixture(scope="module")
def odd_checkpoint(tmp_path_factory):
    """The random checkpoint of one of MODELS."""
    made: dict[str, Checkpoint] = {}

    def get(name: str) -> Checkpoint:
        if name not in made:
            made[name] = Checkpoint(MODELS[name](), tmp_path_factory.mktemp(name), SEEDS[name])
        return made[name]

    return get


@pytest.mark.parametrize(
    ("name", "num_ranks"),
    [("tied", 2), ("sparse", 2), ("normalised heads", 2), pytest.param("biased", 4, marks=pytest.mark.slow)],
)
def test_uneven_ranks(odd_checkpoint, name, num_ranks):
    """KV heads that several ranks have, and shares of everything else of which the last is the smallest."""
    checkpoint = odd_checkpoint(name)
    with engine(checkpoint.path, tensor_parallel_size=num_ranks, max_logprobs=-1) as llm:
        assert tokens(generate(llm, mixed_prompts())) == expected(checkpoint, mixed_prompts())
        for request in REQUESTS.values():
            params = SamplingParams(seed=3, max_tokens=6, ignore_eos=True, **request)
            for result, prompt in zip(generate(llm, PROMPTS, params), PROMPTS, strict=True):
                check_sample(result.outputs[0], checkpoint, prompt, params)
                check_prompt(result, checkpoint, prompt, params)
        check_all_logprobs(llm, checkpoint)


def check_all_logprobs(llm: LLM, checkpoint: Checkpoint) -> None:
    """Of each token of the vocabulary, of a prompt's tokens and of the text's."""
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, logprobs=-1, prompt_logprobs=-1)
    (result,) = generate(llm, [PROMPTS[1]], params)
    want = complete(checkpoint, PROMPTS[1], params)
    entries = [*result.prompt_logprobs[1:], *result.outputs[0].logprobs]
    for entry, logprobs in zip(entries, [*want.prompt_logprobs, *want.logprobs], strict=True):
        assert set(entry) == set(range(321))
        assert torch.allclose(torch.tensor([entry[i].logprob for i in range(321)]), logprobs, atol=1e-4)
