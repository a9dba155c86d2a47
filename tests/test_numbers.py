"""Numbers that are none: a request without a finite logit ends with an error, and disturbs nobody."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from checkpoints import CONFIGS, EOS_TOKEN_IDS, VOCAB_SIZE, Checkpoint, random_prompt
from engines import MAX_TOKENS, check_idle, engine
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_sampler import sample
from thread_fuzz import make_checkpoint

from nanovllm import LLM, SamplingParams
from nanovllm.outputs import RequestError
from nanovllm.sampling_params import RequestOutputKind

BAD = 7  # the token whose embedding is no number
GREEDY = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True)
DRAWN = SamplingParams(seed=3, top_k=5, max_tokens=MAX_TOKENS, ignore_eos=True)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


# ---- the sampler ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options",
    [{"temperatures": 0.0}, {}, {"top_ks": 5, "top_ps": 0.9, "min_ps": 0.01}],
    ids=["greedy", "plain", "filters"],
)
def test_rows_without_a_finite_maximum(options, dtype, device):
    """They give -1, wherever in the row it is, and the other rows what they give alone."""
    nan, inf = torch.nan, torch.inf
    logits = torch.randn(12, 40_000, generator=torch.Generator().manual_seed(0)).to(dtype)
    want = sample(logits, device, **options)
    for row, (place, value) in enumerate(
        [(slice(None), nan), (slice(None), -inf), (39_999, nan), (0, inf), (20_000, nan)]
    ):
        logits[2 * row, place] = value
    logits[9, 1000:] = -inf  # only a mask: the rest is finite
    drawn = sample(logits, device, **options)
    assert drawn[0:10:2].tolist() == [-1] * 5
    assert torch.equal(drawn[[1, 3, 5, 7, 10, 11]], want[[1, 3, 5, 7, 10, 11]])
    assert 0 <= drawn[9] < 1000


# ---- through the engine --------------------------------------------------------------------------------------------


class Damaged:
    """A checkpoint without ties, whose logits are no numbers once a text has the token BAD; transformers' is whole."""

    def __init__(self, folder, value: float) -> None:
        self.whole = Checkpoint(CONFIGS["qwen2"](), folder)
        self.path = self.whole.path
        tensors = load_file(folder / "model.safetensors")
        tensors["model.embed_tokens.weight"][BAD] = value
        save_file(tensors, folder / "model.safetensors")

    def good_prompts(self) -> list[tuple[int, ...]]:
        """Whose texts never have the token."""
        prompts = (random_prompt(seed, 20 + seed % 40) for seed in itertools.count(100))
        return list(itertools.islice((p for p in prompts if BAD not in p + tuple(self.want(p))), 6))

    def want(self, prompt: tuple[int, ...]) -> list[int]:
        return self.whole.greedy(prompt, MAX_TOKENS, True)[0]


@pytest.fixture(scope="module", params=[math.nan, math.inf], ids=str)
def damaged(request, tmp_path_factory):
    return Damaged(tmp_path_factory.mktemp("damaged"), request.param)


def bad_prompt(prompt: tuple[int, ...], place: int) -> list[int]:
    return [*prompt[:place], BAD, *prompt[place:]]


OPTIONS = [
    {},
    {"async_scheduling": False},
    {"max_num_batched_tokens": 12},
    {"num_kvcache_blocks": 19, "max_num_seqs": 4},
    pytest.param({"tensor_parallel_size": 2}, marks=pytest.mark.slow),
    pytest.param({"device": "cuda", "gpu_memory_utilization": 0.3, "num_kvcache_blocks": 19}, marks=pytest.mark.gpu),
    pytest.param({"device": "cuda", "attention_backend": "torch", "num_kvcache_blocks": 19}, marks=pytest.mark.gpu),
    pytest.param({"device": "cuda", "enforce_eager": True, "num_kvcache_blocks": 19}, marks=pytest.mark.gpu),
]


@pytest.mark.parametrize("damaged", [math.nan], indirect=True)
@pytest.mark.parametrize("params", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_bad_request_among_good_ones(damaged, options, params):
    """It says which it was and what to check; what it leaves in the cache reaches no other request."""
    good = damaged.good_prompts()
    with engine(damaged.path, **{"dtype": "float32"} | options) as llm:
        want = [llm.generate(list(prompt), params, use_tqdm=False)[0]["token_ids"] for prompt in good]
        if params is GREEDY:
            assert want == [damaged.want(prompt) for prompt in good]
        for place in (0, 10, 20):
            prompts = [list(prompt) for prompt in good]
            prompts.insert(2, bad_prompt(good[0], place))
            number = llm.num_seqs + 2
            names = f"request {number} failed.*prompt of {len(prompts[2])} tokens.*dtype='float32'.*{damaged.path}"
            with pytest.raises(RequestError, match=names) as raised:
                llm.generate(prompts, params, use_tqdm=False)
            check_idle(llm)
            results = raised.value.results
            assert results.pop(2)["finish_reason"] == "error"
            assert [result["token_ids"] for result in results] == want
        # The blocks that held it are used again, and parts of them lie behind the ends of others.
        for _ in range(2):
            results = llm.generate([list(prompt) for prompt in good], params, use_tqdm=False)
            assert [result["token_ids"] for result in results] == want


def test_a_token_that_makes_the_next_step_fail(damaged):
    """What was generated before is there; steps hand out the failed result like others."""
    prompt = next(p for p in map(random_prompt, range(1000), itertools.repeat(20)) if BAD in damaged.want(p)[1:9])
    want = damaged.want(prompt)[: damaged.want(prompt).index(BAD) + 1]
    good = damaged.good_prompts()[0]
    with engine(damaged.path, dtype="float32") as llm:
        params = replace(GREEDY, output_kind=RequestOutputKind.FINAL_ONLY)
        ids = [llm.add_request(list(p), params) for p in (prompt, good)]
        results = {}
        while not llm.is_finished():
            results.update({int(result["request_id"]): result for result in llm.step()})
        assert (results[ids[0]]["token_ids"], results[ids[0]]["finish_reason"]) == (want, "error")
        assert f"request {ids[0]} failed" in results[ids[0]]["error"]
        assert results[ids[1]]["token_ids"] == damaged.want(good) and "error" not in results[ids[1]]
        check_idle(llm)


def test_a_stream_that_fails(tmp_path):
    make_checkpoint(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    with LLM(str(tmp_path), device="cpu", kvcache_block_size=16, max_model_len=128) as llm:
        token_ids = llm.generate([5, 6], GREEDY, use_tqdm=False)[0]["token_ids"]
    bad = token_ids[6]
    tensors["model.embed_tokens.weight"][bad] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors")
    with LLM(str(tmp_path), device="cpu", kvcache_block_size=16, max_model_len=128) as llm:
        taken = []
        with pytest.raises(RequestError, match="request 0 failed"):
            for piece in llm.stream([5, 6], GREEDY):
                taken.append(piece)
        end = token_ids.index(bad) + 1
        assert "".join(taken) == llm.tokenizer.decode(token_ids[:end]).rstrip("\ufffd") != ""
        check_idle(llm)


def test_float16_overflows(tmp_path):
    """The same weights are fine in float32."""
    checkpoint = Checkpoint(CONFIGS["qwen2"](), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"] *= 1e6
    save_file(tensors, tmp_path / "model.safetensors")
    prompt = list(random_prompt(1, 20))
    with engine(checkpoint.path, dtype="float32") as llm:
        assert len(llm.generate(prompt, GREEDY, use_tqdm=False)[0]["token_ids"]) == MAX_TOKENS
    with engine(checkpoint.path, dtype="float16") as llm:
        with pytest.raises(RequestError, match="dtype='float16'"):
            llm.generate(prompt, GREEDY, use_tqdm=False)
        check_idle(llm)


# ---- the extremes of every parameter -------------------------------------------------------------------------------


BIG = [2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 2**127, 10**400]
INTS = st.one_of(st.sampled_from(BIG + [-number for number in BIG]), st.integers(-3, VOCAB_SIZE + 3), st.integers())
FLOATS = st.one_of(
    st.sampled_from([0.0, -0.0, 5e-324, 1e-45, 1e-38, 1e-30, 1 - 2**-53, 1.0, 3.4e38, 3.5e38, 1e300, 10**400]),
    st.floats(0, 1),
    st.floats(),
)


@pytest.fixture(scope="module")
def llm(checkpoint):
    with engine(checkpoint("qwen3").path, max_num_seqs=4) as llm:
        yield llm


@settings(max_examples=300, deadline=None)
@given(
    options=st.fixed_dictionaries(
        {},
        optional={
            "temperature": FLOATS,
            "top_k": INTS,
            "top_p": FLOATS,
            "min_p": FLOATS,
            "max_tokens": st.one_of(INTS, st.integers(1, 5)),
            "seed": INTS,
            "stop_token_ids": st.lists(INTS, max_size=2),
        },
    )
)
@example(options={"top_k": 2**63 - 1})
@example(options={"top_k": 2**63})
@example(options={"temperature": 3.4028234663852886e38, "top_k": 2**40, "top_p": 5e-324, "min_p": 5e-324})
@example(options={"seed": -(2**63), "max_tokens": 2**70})
def test_every_extreme_is_refused_or_answered(llm, options):
    try:
        params = SamplingParams(**options)
    except (TypeError, ValueError) as error:
        assert any(name in str(error) for name in options)
        return
    prompt = [[5, 6] * 140, [7, 8] * 140]  # room for 20 tokens
    results = llm.generate(prompt, [params, GREEDY], use_tqdm=False)
    ends = {*EOS_TOKEN_IDS, *params.stop_token_ids}
    token_ids = results[0]["token_ids"]
    assert all(0 <= token_id < VOCAB_SIZE for token_id in token_ids)
    assert len(token_ids) == min(params.max_tokens, 20) or token_ids[-1] in ends
    check_idle(llm)


@pytest.mark.parametrize("top_k", [VOCAB_SIZE, VOCAB_SIZE + 1, 2**31, 2**63 - 1])
def test_a_top_k_of_the_whole_vocabulary_is_no_filter(llm, top_k):
    drawn = [
        llm.generate([5, 6], SamplingParams(seed=1, max_tokens=20, ignore_eos=True, top_k=k), use_tqdm=False)[0]
        for k in (-1, top_k)
    ]
    assert drawn[0]["token_ids"] == drawn[1]["token_ids"]


def test_a_cache_with_more_slots_than_its_numbers_hold(checkpoint):
    with pytest.raises(ValueError, match=r"num_kvcache_blocks=134217728.*kvcache_block_size=16"):
        engine(checkpoint("qwen3").path, num_kvcache_blocks=2**27)
