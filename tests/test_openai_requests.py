"""What the bodies of OpenAI's requests ask for, and what is refused in them; and the form of the answers."""

from __future__ import annotations

import json
import math
import re
from types import SimpleNamespace

import pytest

from nanovllm import SamplingParams
from nanovllm.outputs import CompletionOutput, Logprob, RequestOutput

pytest.importorskip("pydantic", reason="needs pydantic, which the extra [batch] brings")
from pydantic import ValidationError

from nanovllm.openai_api.answers import Answer
from nanovllm.openai_api.errors import Refused, from_validation
from nanovllm.openai_api.protocol import MOST_WORDS, ChatRequest, CompletionRequest, DetokenizeRequest
from nanovllm.openai_api.served_model import ServedModel

DEFAULTS = SamplingParams(temperature=0.6, top_k=20, max_tokens=99)
MESSAGES = [{"role": "user", "content": "Hello"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


def request(is_chat: bool = True, **body) -> ChatRequest | CompletionRequest:
    if is_chat:
        return ChatRequest.model_validate({"messages": MESSAGES} | body)
    return CompletionRequest.model_validate({"prompt": "a"} | body)


def params_of(is_chat: bool = True, **body) -> SamplingParams:
    params = request(is_chat, **body).sampling_params(DEFAULTS)
    params.check()
    return params


def final(**fields) -> SamplingParams:
    params = SamplingParams(**fields)
    params.output_kind = request().sampling_params(DEFAULTS).output_kind
    return params


def test_every_field():
    params = params_of(
        model="m", temperature=0.5, top_p=0.9, n=2, seed=3, stop=["a", "b"], presence_penalty=1, frequency_penalty=-1,
        logit_bias={"5": 7}, max_completion_tokens=8, logprobs=True, top_logprobs=4, top_k=5,
        min_p=0.1, repetition_penalty=1.1, min_tokens=1, stop_token_ids=[7], ignore_eos=True, bad_words=["x"],
        allowed_token_ids=[5, 6], skip_special_tokens=False, spaces_between_special_tokens=False,
        include_stop_str_in_output=True, truncate_prompt_tokens=4,
    )  # fmt: skip
    assert params == final(
        temperature=0.5, top_p=0.9, n=2, seed=3, stop=["a", "b"], presence_penalty=1, frequency_penalty=-1,
        logit_bias={5: 7.0}, max_tokens=8, logprobs=4, top_k=5, min_p=0.1, repetition_penalty=1.1, min_tokens=1,
        stop_token_ids=[7], ignore_eos=True, bad_words=["x"], allowed_token_ids=[5, 6], skip_special_tokens=False,
        spaces_between_special_tokens=False, include_stop_str_in_output=True, truncate_prompt_tokens=4,
    )  # fmt: skip


@pytest.mark.parametrize("is_chat", [True, False])
def test_fields_that_change_nothing(is_chat):
    """As OpenAI's clients put them into bodies."""
    body = {
        "user": "me", "metadata": {"job": "nightly"}, "store": True, "service_tier": "auto", "safety_identifier": "a",
        "prompt_cache_key": "b", "prompt_cache_retention": "24h", "priority": 0, "stream": False, "best_of": None,
    }  # fmt: skip
    if is_chat:
        body |= {"tools": [], "parallel_tool_calls": True, "modalities": ["text"], "tool_choice": "none"}
    assert params_of(is_chat, **body) == params_of(is_chat)


def test_what_is_not_given():
    """The model's defaults, but for the number of tokens."""
    chat = params_of(temperature=None, n=None, logprobs=None, response_format=None, stream_options=None)
    assert chat == final(temperature=0.6, top_k=20, max_tokens=None)
    assert params_of(False) == final(temperature=0.6, top_k=20, max_tokens=16)


@pytest.mark.parametrize(
    ("is_chat", "body", "logprobs"),
    [
        (True, {"logprobs": True}, 0),
        (True, {"logprobs": True, "top_logprobs": 3}, 3),
        (True, {"logprobs": False}, None),
        (False, {"logprobs": 0}, 0),
        (False, {"logprobs": 2}, 2),
    ],
    ids=str,
)
def test_logprobs(is_chat, body, logprobs):
    assert params_of(is_chat, **body).logprobs == logprobs


@pytest.mark.parametrize(
    ("body", "max_tokens"), [({"max_tokens": 5}, 5), ({"max_tokens": 5, "max_completion_tokens": 6}, 6)], ids=str
)
def test_max_tokens_of_a_chat(body, max_tokens):
    assert params_of(**body).max_tokens == max_tokens


@pytest.mark.parametrize(
    ("body", "structure"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object", "json_schema": None}}, {"json_object": True}),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}},
            {"json": SCHEMA},
        ),
        ({"guided_json": SCHEMA}, {"json": SCHEMA}),
        ({"guided_regex": "a+"}, {"regex": "a+"}),
        ({"guided_choice": ["a", "b"]}, {"choice": ["a", "b"]}),
        ({"guided_grammar": 'root ::= "a"'}, {"grammar": 'root ::= "a"'}),
        ({"structured_outputs": {"regex": "a+"}}, {"regex": "a+"}),
    ],
    ids=str,
)
def test_structures(body, structure):
    assert params_of(**body).structured_outputs == SamplingParams(structured_outputs=structure).structured_outputs


@pytest.mark.parametrize(
    ("is_chat", "body", "match"),
    [
        (True, {"temprature": 1}, "temprature is not supported"),
        (True, {"prompt": "a"}, "prompt is not supported"),
        (True, {"messages": "Hello"}, "messages: "),
        (True, {"tools": {"type": "function"}}, "tools: "),
        (True, {"temperature": "hot"}, "temperature: "),
        (True, {"logprobs": 5}, "logprobs: "),
        (True, {"metadata": "text"}, "metadata: "),
        (True, {"stream_options": {"x": 1}}, "stream_options.x is not supported"),
        (True, {"top_logprobs": 5}, "top_logprobs needs logprobs=true"),
        (True, {"guided_regex": 5}, "guided_regex: "),
        (False, {"prompt": 5}, "prompt: "),
        (False, {"prompt": None}, "prompt: Field required"),
        (False, {"stop": 5}, "stop: "),
        (False, {"logprobs": True}, "logprobs: "),
        (True, {"stream_options": {"include_usage": True}}, "stream_options needs stream=true"),
        (
            True,
            {"stream": True, "stream_options": {"include_obfuscation": True}},
            "stream_options.include_obfuscation: ",
        ),
        (True, {"max_completion_tokens": 0}, "max_completion_tokens: "),
        (True, {"echo": True}, "echo is not supported"),
        (True, {"tools": [{"type": "function"}]}, "tools: each must have a function with a name, got {"),
        (True, {"tools": [{"function": {"name": 5}}]}, "tools: each must have a function with a name, got {"),
        (False, {"echo": 1}, "echo: "),
        (False, {"best_of": 2}, "best_of: "),
        (False, {"tools": []}, "tools is not supported"),
    ],
    ids=str,
)
def test_what_no_request_may_hold(is_chat, body, match):
    """The error names the field."""
    with pytest.raises(ValidationError) as caught:
        request(is_chat, **body)
    refused = from_validation(caught.value.errors()[0])
    assert str(refused).startswith(match) and refused.status == 400
    assert refused.param == (None if " needs " in match else re.split(" is |:", match)[0])


@pytest.mark.parametrize(
    ("body", "match"),
    [
        ({"temperature": -1}, "temperature must be"),
        ({"max_tokens": 0}, "max_tokens must be"),
        ({"n": 0}, "n must be"),
        ({"response_format": {"type": "xml"}}, "response_format must be of type"),
        ({"response_format": {"type": "json_schema"}}, "response_format must be of type"),
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, "json_object.* with nothing beside it"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "by one of guided_regex, guided_choice, got several"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "got several"),
    ],
    ids=str,
)
def test_parameters_that_make_no_sense(body, match):
    with pytest.raises(ValueError, match=match):
        params_of(**body)


@pytest.mark.parametrize(
    ("is_chat", "field", "item"),
    [
        (False, "prompt", {}),
        (False, "stop", 1),
        (False, "bad_words", 1),
        (False, "stop_token_ids", "a"),
        (False, "allowed_token_ids", True),
        (False, "guided_choice", 1),
        (True, "messages", 1),
        (True, "tools", 1),
        (True, "modalities", 1),
    ],
)
def test_thousands_of_mistakes(is_chat, field, item):
    """Only the first is described: of a body's millions, descriptions would take gigabytes."""
    with pytest.raises(ValidationError) as caught:
        request(is_chat, **{field: [item] * 10_000})
    assert caught.value.error_count() <= 2
    assert from_validation(caught.value.errors()[0]).param == field


def test_thousands_of_fields():
    with pytest.raises(ValidationError, match="at most 100 fields, got 10001") as caught:
        request(**{f"field{index}": 1 for index in range(10_000)})
    assert caught.value.error_count() == 1
    with pytest.raises(TypeError, match="logit_bias"):
        params_of(logit_bias={str(index): {} for index in range(10_000)})


@pytest.mark.parametrize("field", ["stop", "bad_words"])
def test_more_words_than_are_looked_for(field):
    assert len(getattr(params_of(**{field: ["a"] * MOST_WORDS}), field)) == MOST_WORDS
    with pytest.raises(ValidationError, match=f"at most {MOST_WORDS}"):
        request(**{field: ["a"] * (MOST_WORDS + 1)})


@pytest.mark.parametrize("tokens", [[-1], [2**32], ["a"], [1.5], [True]], ids=str)
def test_ids_that_no_token_can_have(tokens):
    with pytest.raises(ValidationError, match="tokens"):
        DetokenizeRequest.model_validate({"tokens": tokens})


@pytest.mark.parametrize("body", [None, [], "text", 5], ids=str)
def test_a_body_that_is_no_object(body):
    with pytest.raises(ValidationError) as caught:
        ChatRequest.model_validate(body)
    assert str(from_validation(caught.value.errors()[0])) == "the body must be an object"


def test_nulls_in_messages_are_as_good_as_nothing():
    """As in an answer that a client sends back: some templates fail at calls that are null."""

    class Template:
        def render(self, messages: list[dict], **options: object) -> str:
            assert messages == [{"role": "assistant", "content": None}, {"role": "user", "content": "a"}]
            return "rendered"

    tokenizer = SimpleNamespace(encode=lambda text, add_special_tokens: [5])
    model = ServedModel(SimpleNamespace(config=None, tokenizer=tokenizer, chat_template=Template()), "m")
    answered = {"role": "assistant", "content": None, "tool_calls": None, "refusal": None, "function_call": None}
    body = request(messages=[answered, {"role": "user", "content": "a", "name": None}])
    assert model.prompts(body) == [{"prompt": "rendered", "prompt_token_ids": [5]}]


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ["a"]),
        ([5, 6], [[5, 6]]),
        (["a", "b"], ["a", "b"]),
        ([[5], [6, 7]], [[5], [6, 7]]),
        (["a", [5]], ["a", [5]]),
    ],
    ids=str,
)
def test_prompts_of_a_completion(prompt, prompts):
    assert request(False, prompt=prompt).prompts() == prompts


def test_no_prompt():
    with pytest.raises(ValueError, match="prompt must"):
        request(False, prompt=[]).prompts()


# ---- answers -------------------------------------------------------------------------------------------------------


def result(*samples: dict) -> RequestOutput:
    """A result whose prompt has three tokens, two of which were cached."""
    outputs = []
    for index, sample in enumerate(samples):
        other = {"index": index, "logprobs": None, "stop_reason": None, "finish_reason": "stop"}
        outputs.append(CompletionOutput(other | sample))
    return RequestOutput(prompt="p", prompt_token_ids=[1, 2, 3], num_cached_tokens=2, outputs=outputs)


def answer(body: ChatRequest | CompletionRequest, *results: RequestOutput) -> dict:
    """The answer to a body whose last prompt has its result first."""
    answer = Answer(body, "m")
    for number in reversed(range(len(results))):
        answer.add(number, results[number])
    return answer.whole()


LOGPROBS = [
    {5: Logprob(-0.5, 1, "a"), 6: Logprob(-1.5, 2, "b")},
    {7: Logprob(-math.inf, 9, "é"), 5: Logprob(-0.1, 1, "a"), 6: Logprob(-2.0, 2, "b")},  # one that was not likely
]
WITH_LOGPROBS = {"text": "aé", "token_ids": [5, 7], "logprobs": LOGPROBS, "finish_reason": "length"}


def test_the_answer_of_a_chat():
    body = answer(request(n=2), result({"text": "x", "token_ids": [5]}, {"text": "yz", "token_ids": [6, 7]}))
    assert body["object"] == "chat.completion" and body["model"] == "m" and body["id"].startswith("chatcmpl-")
    assert [choice["message"]["content"] for choice in body["choices"]] == ["x", "yz"]
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    assert all(choice["message"]["role"] == "assistant" and choice["logprobs"] is None for choice in body["choices"])
    details = {"prompt_tokens_details": {"cached_tokens": 2}}
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6} | details


@pytest.mark.parametrize("num_top", [0, 1, 2])
def test_logprobs_of_a_chat(num_top):
    body = request(logprobs=True, top_logprobs=num_top)
    (choice,) = answer(body, result(WITH_LOGPROBS))["choices"]
    first, second = choice["logprobs"]["content"]
    a, b = ({"token": text, "logprob": p, "bytes": [ord(text)]} for text, p in (("a", -0.5), ("b", -1.5)))
    assert first == a | {"top_logprobs": [a, b][:num_top]}
    assert {name: second[name] for name in a} == {"token": "é", "logprob": -9999.0, "bytes": [0xC3, 0xA9]}
    assert [entry["token"] for entry in second["top_logprobs"]] == ["a", "b"][:num_top]
    json.loads(json.dumps(choice, allow_nan=False))


def test_the_answer_of_a_completion():
    """The prompts' samples one behind the other, whichever is there first."""
    results = [result({"text": "x", "token_ids": [5]}), result(WITH_LOGPROBS)]
    body = answer(request(False, prompt=["p", "p"]), *results)
    assert body["object"] == "text_completion" and body["id"].startswith("cmpl-")
    assert [(choice["index"], choice["text"]) for choice in body["choices"]] == [(0, "x"), (1, "aé")]
    assert [choice["finish_reason"] for choice in body["choices"]] == ["stop", "length"]
    assert body["choices"][0]["logprobs"] is None
    logprobs = body["choices"][1]["logprobs"]
    assert logprobs["tokens"] == ["a", "é"] and logprobs["text_offset"] == [0, 1]
    assert logprobs["token_logprobs"] == [-0.5, -9999.0]
    assert logprobs["top_logprobs"] == [{"a": -0.5, "b": -1.5}, {"é": -9999.0, "a": -0.1, "b": -2.0}]
    assert body["usage"]["prompt_tokens"] == 6 and body["usage"]["completion_tokens"] == 3


def test_the_usage_of_a_stream_is_in_its_last_chunk():
    """And null in those before, as OpenAI documents it."""
    for options, usages in [({"stream_options": {"include_usage": True}}, [None]), ({}, [])]:
        streamed = Answer(request(stream=True, **options), "m")
        chunks = list(streamed.chunks(0, result({"text": "x", "token_ids": [5]})))
        assert [chunk["usage"] for chunk in chunks if "usage" in chunk] == usages
        assert streamed.usage_chunk()["usage"]["total_tokens"] == 4 and streamed.usage_chunk()["choices"] == []


@pytest.mark.parametrize(
    ("status", "kind"), [(400, "invalid_request_error"), (404, "not_found_error"), (500, "server_error")]
)
def test_errors(status, kind):
    assert Refused(status, "bad").body()["error"] == {"message": "bad", "type": kind, "param": None, "code": None}
