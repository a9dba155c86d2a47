"""Every form of a prompt becomes the same request, parameters are fitted to it, and the rest is refused by name."""

from __future__ import annotations

import json
import random
import time
from types import SimpleNamespace

import numpy as np
import pytest
from engines import check_idle
from test_text import ANSWERS, DEMO, HF_TOKENIZER, QUESTION, TOKENIZER, greedy, prompt_ids
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, processors

from nanovllm import LLM, SamplingParams
from nanovllm.compat.refused_arguments import REFUSED_ARGUMENTS
from nanovllm.inputs import TextPrompt, TokensPrompt
from nanovllm.requests.admission import check_request, check_requests
from nanovllm.sampling_params import BeamSearchParams, GuidedDecodingParams, StructuredOutputsParams
from nanovllm.text.tokenizer import Tokenizer

WORDS = ["<s>", "the", "tin", "iron", "end", "in"]
VOCAB_SIZE = len(WORDS)
TEXT, IDS = "the tin", [0, 1, 2]  # with BOS
DEFAULTS = SamplingParams(temperature=0.5)


def words_tokenizer() -> Tokenizer:
    """One token a word, and a BOS."""
    backend = Backend(models.WordLevel({word: token_id for token_id, word in enumerate(WORDS)}, unk_token="<s>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return Tokenizer(backend, None, False)


WORD_TOKENIZER = words_tokenizer()


def config(max_model_len: int = 16, positions: int = 16, max_logprobs: int = 20) -> SimpleNamespace:
    facts = SimpleNamespace(vocab_size=VOCAB_SIZE, max_position_embeddings=positions)
    return SimpleNamespace(max_model_len=max_model_len, max_logprobs=max_logprobs, model_config=facts)


def check(prompts, params=None, prompt_token_ids=None, tokenizer=WORD_TOKENIZER, **options):
    return check_requests(prompts, params, config(**options), tokenizer, DEFAULTS, prompt_token_ids)


def plain(requests) -> list[tuple]:
    return [(request.prompt, request.token_ids) for request in requests]


FORMS = {
    "text": (TEXT, TEXT),
    "list": (IDS, None),
    "tuple": (tuple(IDS), None),
    "array": (np.array(IDS), None),
    "numpy ints": ([np.int64(token_id) for token_id in IDS], None),
    "TextPrompt": (TextPrompt(prompt=TEXT), TEXT),
    "TokensPrompt": (TokensPrompt(prompt_token_ids=IDS), None),
    "array in a dict": ({"prompt_token_ids": np.array(IDS)}, None),
    "both": ({"prompt": "another text", "prompt_token_ids": IDS}, "another text"),
    "text without ids": ({"prompt": TEXT, "prompt_token_ids": None}, TEXT),
    "ids without text": ({"prompt": None, "prompt_token_ids": tuple(IDS)}, None),
    "nothing else": ({"prompt": TEXT} | dict.fromkeys(REFUSED_ARGUMENTS), TEXT),
    "empty others": ({"prompt": TEXT, "multi_modal_data": {}, "cache_salt": "", "mm_processor_kwargs": {}}, TEXT),
}


@pytest.mark.parametrize(("prompt", "text"), FORMS.values(), ids=FORMS)
def test_every_form(prompt, text):
    for requests in (check(prompt), check([prompt]), check((prompt,), [DEFAULTS])):
        assert plain(requests) == [(text, IDS)]
        assert all(type(token_id) is int for token_id in requests[0].token_ids)
    assert plain([check_request(prompt, None, config(), WORD_TOKENIZER, DEFAULTS)]) == [(text, IDS)]


def test_a_list_may_mix_them():
    prompts, texts = zip(*FORMS.values(), strict=True)
    assert plain(check(prompts)) == [(text, IDS) for text in texts]
    assert plain(check(np.array([IDS, IDS]))) == [(None, IDS)] * 2
    assert check([]) == check(()) == check([], []) == check(None, prompt_token_ids=[]) == []


def test_the_ids_are_the_requests_own():
    given = list(IDS)
    (request,) = check({"prompt_token_ids": given})
    given.append(1)
    assert request.token_ids == IDS


@pytest.mark.parametrize(
    ("prompts", "ids", "want"),
    [
        (None, IDS, [(None, IDS)]),
        (None, np.array(IDS), [(None, IDS)]),
        (None, [IDS, (3, 4)], [(None, IDS), (None, [3, 4])]),
        ([TEXT, None], [[3], [4]], [(TEXT, [3]), (None, [4])]),
        (TEXT, IDS, [(TEXT, IDS)]),
    ],
    ids=str,
)
def test_ids_by_their_older_keyword(prompts, ids, want):
    assert plain(check(prompts, prompt_token_ids=ids)) == want


@pytest.mark.parametrize(
    ("prompts", "ids", "error", "match"),
    [
        ([TEXT, TEXT], [IDS], ValueError, "prompt_token_ids.*1.*2"),
        ([TEXT], IDS + IDS, None, None),
        (None, "text", TypeError, "list of token ids.*text"),
        (None, [IDS, "text"], TypeError, "list of token ids.*text"),
        (None, [IDS, None], TypeError, "list of token ids.*None"),
        ([IDS], [IDS], TypeError, "'prompt'.*string"),
        (None, None, TypeError, "prompts, or token ids by the keyword prompt_token_ids"),
    ],
    ids=str,
)
def test_bad_ids_by_their_older_keyword(prompts, ids, error, match):
    if error is None:
        assert len(check(prompts, prompt_token_ids=ids)) == 1
        return
    with pytest.raises(error, match=match):
        check(prompts, prompt_token_ids=ids)


@pytest.mark.parametrize("name", REFUSED_ARGUMENTS)
def test_what_is_not_supported_is_refused_by_name(name):
    for value in ({"image": 1}, [0.5], "x", np.zeros((3, 2)), object()):
        with pytest.raises(ValueError, match=f"{name} is not supported: .{{10}}"):
            check([TEXT, {"prompt": TEXT, name: value}])


@pytest.mark.parametrize(
    ("prompt", "error", "match"),
    [
        ({}, TypeError, r"string or a list.*\{\}"),
        ({"prompt": None}, TypeError, "string or a list.*None"),
        ({"prompt": [1, 2]}, TypeError, r"'prompt'.*string.*\[1, 2\]"),
        ({"prompt": [1, 2], "prompt_token_ids": IDS}, TypeError, r"'prompt'.*string.*\[1, 2\]"),
        ({"prompt_token_ids": TEXT}, TypeError, "list of token ids.*the tin"),
        ({"prompt": TEXT, "prompt_token_ids": 5}, TypeError, "list of token ids.*5"),
        ({"prompt_token_ids": []}, ValueError, "must have tokens"),
        ({"prompt": TEXT, "prompt_token_ids": []}, ValueError, "must have tokens"),
        ({"prompt_token_ids": [1, VOCAB_SIZE]}, ValueError, f"between 0 and {VOCAB_SIZE - 1}, got {VOCAB_SIZE}"),
        ({"prompt_token_ids": [1, "a"]}, TypeError, "ints.*'a'"),
        ({"role": "user", "content": "hello"}, TypeError, "'prompt' and 'prompt_token_ids', got 'role'.*chat"),
        ({"prompt": TEXT, "prompt_ids": IDS}, TypeError, "got 'prompt_ids'"),
    ],
    ids=str,
)
def test_bad_dicts(prompt, error, match):
    for call in (lambda: check(prompt), lambda: check([TEXT, prompt])):
        with pytest.raises(error, match=match):
            call()


@pytest.mark.parametrize("num_kept", [1, 2, 5, 15, 1000, -1])
@pytest.mark.parametrize("num_tokens", [1, 5, 15, 16, 40])
def test_truncation_keeps_the_end(num_kept, num_tokens):
    ids = [1 + i % 5 for i in range(num_tokens)]
    params = SamplingParams(truncate_prompt_tokens=num_kept, max_tokens=None)
    kept = ids[-15:] if num_kept == -1 else ids[-num_kept:]
    text = " ".join(WORDS[token_id] for token_id in ids[1:])  # and a BOS
    for prompt in (ids, {"prompt_token_ids": ids}, text):
        if len(kept) > 15:
            with pytest.raises(ValueError, match=f"max_model_len=16, got {len(kept)}"):
                check(prompt, params)
        else:
            (request,) = check(prompt, params)
            assert request.token_ids == (kept if prompt is not text else [0, *ids[1:]][-len(kept) :])
            assert request.params.max_tokens == 16 - len(kept)


def test_a_prompt_that_is_too_long():
    """The error names the option, what the model itself takes, and what to do."""
    with pytest.raises(
        ValueError, match=r"fewer tokens than max_model_len=16, got 16; shorten.*truncate_prompt"
    ) as of:
        check([1] * 16)
    assert "itself" not in str(of.value)
    match = (
        r"max_model_len=16, got 30; the model itself takes 4096: raise LLM\(\.\.\., max_model_len=4096\), or shorten"
    )
    with pytest.raises(ValueError, match=match):
        check([1] * 30, positions=4096)
    assert len(check([1] * 15)[0].token_ids) == 15


# ---- parameters ----------------------------------------------------------------------------------------------------


def test_parameters_are_those_given_or_the_defaults():
    mine = [SamplingParams(max_tokens=3), SamplingParams(temperature=0.25)]
    assert [request.params for request in check([IDS, IDS])] == [DEFAULTS] * 2
    assert [request.params for request in check([IDS, IDS], mine)] == mine
    assert [request.params for request in check([IDS, IDS], mine[0])] == mine[:1] * 2


def test_parameters_are_copied_once_and_for_all(monkeypatch):
    calls = []
    unwatched = SamplingParams.check
    params = SamplingParams(logit_bias={1: 2.0}, bad_words=["tin"])
    monkeypatch.setattr(SamplingParams, "check", lambda self: (calls.append(self), unwatched(self)))
    first, second, third = check([IDS] * 3, [params, SamplingParams(), params])
    assert first.params is third.params and first.params is not second.params
    assert len(calls) == 3  # two of them here, one as it was made
    want = params.clone()
    params.temperature, params.max_tokens = 0.0, 1
    params.logit_bias[1] = 5.0
    assert first.params == want != params


def test_parameters_are_checked_when_used():
    params = SamplingParams()
    params.temperature = -1.0
    with pytest.raises(ValueError, match=r"temperature.*-1\.0"):
        check([IDS], params)
    params.temperature, params.stop = 1.0, "in"
    assert check([IDS], params)[0].params.stop == ("in",)
    params.guided_decoding = GuidedDecodingParams(choice=["in"])
    (request,) = check([IDS], params)
    assert request.params.structured_outputs.choice == ("in",) and request.params.guided_decoding is None


def test_max_tokens_of_none_is_what_fits():
    requests = check([IDS, [1]], SamplingParams(max_tokens=None, min_tokens=100))
    assert [request.params.max_tokens for request in requests] == [13, 15]
    requests = check([IDS, [1]], SamplingParams(max_tokens=100))
    assert [request.params.max_tokens for request in requests] == [100, 100]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"allowed_token_ids": [2**40]}, f"allowed_token_ids.*between 0 and 5, got {2**40}"),
        ({"logit_bias": {"7": 1.0}}, "logit_bias.*between 0 and 5, got 7"),
        ({"allowed_token_ids": [0, 6]}, "allowed_token_ids.*between 0 and 5, got 6"),
        ({"logprobs": 21}, r"logprobs=21.*max_logprobs=20.*LLM\(\.\.\., max_logprobs=21\)"),
        ({"prompt_logprobs": 99}, "prompt_logprobs=99.*max_logprobs=20"),
        ({"logprobs": -1}, r"logprobs=-1.*max_logprobs=20.*LLM\(\.\.\., max_logprobs=-1\)"),
        ({"prompt_logprobs": 7}, "prompt_logprobs.*6 tokens, got 7"),
    ],
    ids=str,
)
def test_parameters_that_do_not_fit_the_model(options, match):
    with pytest.raises(ValueError, match=match):
        check([IDS], SamplingParams(**options))


def test_parameters_that_just_fit_the_model():
    ids = list(range(VOCAB_SIZE))
    check([IDS], SamplingParams(stop_token_ids=ids, allowed_token_ids=ids, logit_bias=dict.fromkeys(ids, 1.0)))
    check([IDS], SamplingParams(logprobs=6, prompt_logprobs=0))
    check([IDS], SamplingParams(logprobs=3, prompt_logprobs=3), max_logprobs=3)
    for num_logprobs in (-1, 6):
        check([IDS], SamplingParams(logprobs=num_logprobs, prompt_logprobs=num_logprobs), max_logprobs=-1)


@pytest.mark.parametrize(
    "options",
    [{"stop": "x"}, {"bad_words": ["x"]}, {"structured_outputs": StructuredOutputsParams(regex="x")}],
    ids=str,
)
def test_what_needs_a_tokenizer(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}=.*needs a tokenizer"):
        check([IDS], SamplingParams(**options), tokenizer=None)
    check([IDS], SamplingParams(**options))


def test_no_tokenizer():
    assert plain(check([IDS, {"prompt": TEXT, "prompt_token_ids": IDS}], tokenizer=None)) == [(None, IDS), (TEXT, IDS)]
    for prompt in (TEXT, {"prompt": TEXT}):
        with pytest.raises(ValueError, match=r"no tokenizer.*the tin"):
            check([IDS, prompt], tokenizer=None)


def test_many_prompts_cost_little():
    """A hundredth of what their steps take; by far, so that a busy machine does not matter."""
    draw = random.Random(0)
    prompts = [[draw.randrange(VOCAB_SIZE) for _ in range(draw.randrange(100, 1025))] for _ in range(256)]
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        check(prompts, DEFAULTS, max_model_len=4096)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.05


# ---- through the engine --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo():
    options = {"device": "cpu", "dtype": "float32", "kvcache_block_size": 16, "max_model_len": 128}
    with LLM(str(DEMO), **options) as llm:
        yield llm
        check_idle(llm)


def test_prompts_of_the_engine(demo):
    text, ids = "introduce", TOKENIZER.encode("introduce")
    params = greedy(max_tokens=4, ignore_eos=True)
    want = demo.generate(ids, params, use_tqdm=False)[0]
    assert (want.prompt, want.prompt_token_ids) == (None, ids)
    prompts = [text, {"prompt": text}, {"prompt_token_ids": ids}, {"prompt": "kept", "prompt_token_ids": ids}]
    results = demo.generate(prompts, params, use_tqdm=False)
    assert [result.token_ids for result in results] == [want.token_ids] * 4
    assert [result.prompt for result in results] == [text, text, None, "kept"]
    (result,) = demo.generate(None, params, prompt_token_ids=ids, use_tqdm=False)
    assert result.token_ids == want.token_ids
    (result,) = demo.generate([[5] * 300 + ids], [greedy(truncate_prompt_tokens=len(ids), max_tokens=4)], False)
    assert result.prompt_token_ids == ids and result.token_ids == want.token_ids
    assert json.loads(json.dumps(result))["prompt_token_ids"] == ids


def test_half_a_character_is_refused(demo):
    """As of a surrogate pair: JSON can hold it, UTF-8 and so the tokenizer cannot."""
    for ask in (lambda text: demo.generate(text), lambda text: demo.chat([{"role": "user", "content": text}])):
        with pytest.raises(ValueError, match=r"whole characters, got .*a\\ud83d"):
            ask("a\ud83d")


def test_an_answer_is_streamed(demo):
    for messages in (QUESTION, tuple(QUESTION)):
        pieces = list(demo.stream(messages, greedy()))
        assert "".join(pieces) == ANSWERS["introduce yourself"] and len(pieces) > 5
    (result,) = demo.chat(QUESTION, greedy(), use_tqdm=False)
    assert result.prompt_token_ids == prompt_ids()
    assert result.prompt == HF_TOKENIZER.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    template = "{{ messages[0].content }}{{ mark }}"
    pieces = demo.stream(QUESTION, greedy(max_tokens=6), chat_template=template, chat_template_kwargs={"mark": "!"})
    assert "".join(pieces) == demo.generate("introduce yourself!", greedy(max_tokens=6), use_tqdm=False)[0].text


@pytest.mark.parametrize(
    ("prompt", "params", "options", "error", "match"),
    [
        (QUESTION, SamplingParams(n=2), {}, ValueError, "one text, got n=2"),
        (QUESTION, SamplingParams(detokenize=False), {}, ValueError, "detokenize=False"),
        ("text", None, {"tools": []}, TypeError, "tools must come with a conversation.*text"),
        (QUESTION, None, {"tolls": []}, TypeError, "tolls"),
        (QUESTION, [SamplingParams()], {}, TypeError, "sampling_params"),
        ([{"content": "no role"}], None, {}, TypeError, "role"),
        ([QUESTION], None, {}, TypeError, "token ids must be ints"),
        (7, None, {}, TypeError, "prompt.*7"),
    ],
    ids=str,
)
def test_what_cannot_be_streamed(demo, prompt, params, options, error, match):
    with pytest.raises(error, match=match):
        demo.stream(prompt, params, **options)


def test_what_scripts_ask_an_engine_for(demo):
    assert demo.llm_engine is demo
    tokenizer = demo.get_tokenizer()
    assert tokenizer is demo.get_tokenizer() and type(tokenizer) is type(HF_TOKENIZER)
    assert tokenizer.encode("introduce") == demo.tokenizer.encode("introduce")
    assert demo.llm_engine.tokenizer.decode(tokenizer.encode("introduce")) == "introduce"
    defaults = demo.get_default_sampling_params()
    assert defaults == demo.default_sampling_params
    defaults.temperature = 0.125
    assert defaults != demo.default_sampling_params


def test_every_form_of_add_request(demo):
    params = greedy(max_tokens=3, ignore_eos=True)
    forms = [
        (("text", params), {}),
        (("text",), {"sampling_params": params}),
        (("text",), {"params": params}),
        ((), {"prompt": "text", "sampling_params": params}),
        (("mine", "text", params), {}),
        (("mine", "text"), {"sampling_params": params}),
        ((), {"request_id": "mine", "prompt": "text", "params": params}),
    ]
    for arguments, options in forms:
        request_id = demo.add_request(*arguments, **options)
        while not (results := [result for result in demo.step() if result.finished]):
            pass
        assert [(result.prompt, len(result.token_ids)) for result in results] == [("text", 3)]
        assert results[0].request_id == str(request_id)
        assert (request_id == "mine") == ("mine" in arguments or "request_id" in options)
    for arguments in (("text", params), ("mine", "text", params)):
        with pytest.raises(TypeError, match=r"one SamplingParams, got \[.*max_tokens=3.*max_tokens=3"):
            demo.add_request(*arguments, sampling_params=params)
    with pytest.raises(TypeError, match="request_id must be a string, got 7"):
        demo.add_request(7, "text", params)


@pytest.mark.parametrize("method", ["encode", "embed", "classify", "score", "reward", "set_tokenizer"])
def test_methods_that_are_refused_by_name(demo, method):
    with pytest.raises(ValueError, match=f"LLM.{method} is not supported: .{{20}}"):
        getattr(demo, method)(["text"], use_tqdm=False)


def test_attributes_that_are_elsewhere(demo):
    with pytest.raises(AttributeError, match=r"'model_config': `llm\.config` has the options"):
        _ = demo.llm_engine.model_config
    with pytest.raises(AttributeError, match=r"'modelconfig'$"):
        _ = demo.modelconfig


def test_adapters_are_refused_by_name(demo):
    adapter = object()
    for call in (
        lambda: demo.generate("text", lora_request=adapter),
        lambda: demo.chat(QUESTION, lora_request=adapter),
        lambda: demo.beam_search(["text"], BeamSearchParams(beam_width=2, max_tokens=2), lora_request=adapter),
    ):
        with pytest.raises(ValueError, match="lora_request is not supported"):
            call()
    with pytest.raises(ValueError, match="mm_processor_kwargs is not supported"):
        demo.chat(QUESTION, mm_processor_kwargs={"size": 1})
