"""What the bodies of OpenAI's requests ask for, and what is refused in them; and the form of the answers."""

from __future__ import annotations

import json
import math

import pytest

from nanovllm import SamplingParams
from nanovllm.batch.openai_requests import (
    CHAT_FIELDS,
    COMPLETION_FIELDS,
    checked_body,
    completion_prompts,
    sampling_params,
)
from nanovllm.batch.openai_results import chat_body, completion_body, error_body
from nanovllm.outputs import CompletionOutput, Logprob, RequestOutput

DEFAULTS = SamplingParams(temperature=0.6, top_k=20, max_tokens=99)
MESSAGES = [{"role": "user", "content": "Hello"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


def params_of(known: frozenset[str] = CHAT_FIELDS, **body) -> SamplingParams:
    if known is CHAT_FIELDS:
        body["messages"] = MESSAGES
    return sampling_params(checked_body(body, known), DEFAULTS)


def test_every_field():
    params = params_of(
        model="m", temperature=0.5, top_p=0.9, n=2, seed=3, stop=["a", "b"], presence_penalty=1, frequency_penalty=-1,
        logit_bias={"5": 7}, max_completion_tokens=8, logprobs=True, top_logprobs=4, user="me", metadata={}, top_k=5,
        min_p=0.1, repetition_penalty=1.1, min_tokens=1, stop_token_ids=[7], ignore_eos=True, bad_words=["x"],
        allowed_token_ids=[5, 6], skip_special_tokens=False, spaces_between_special_tokens=False,
        include_stop_str_in_output=True, truncate_prompt_tokens=4, priority=0, store=True, stream=False, tools=[],
    )  # fmt: skip
    assert params == SamplingParams(
        temperature=0.5, top_p=0.9, n=2, seed=3, stop=["a", "b"], presence_penalty=1, frequency_penalty=-1,
        logit_bias={5: 7.0}, max_tokens=8, logprobs=4, top_k=5, min_p=0.1, repetition_penalty=1.1, min_tokens=1,
        stop_token_ids=[7], ignore_eos=True, bad_words=["x"], allowed_token_ids=[5, 6], skip_special_tokens=False,
        spaces_between_special_tokens=False, include_stop_str_in_output=True, truncate_prompt_tokens=4,
    )  # fmt: skip


def test_what_is_not_given():
    """The model's defaults, but for the number of tokens."""
    chat = params_of(temperature=None, n=None, logprobs=None, response_format=None, stream_options=None)
    assert chat == SamplingParams(temperature=0.6, top_k=20, max_tokens=None)
    assert params_of(COMPLETION_FIELDS, prompt="a") == SamplingParams(temperature=0.6, top_k=20, max_tokens=16)


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
    assert params_of(CHAT_FIELDS if is_chat else COMPLETION_FIELDS, **body).logprobs == logprobs


@pytest.mark.parametrize(
    ("body", "max_tokens"), [({"max_tokens": 5}, 5), ({"max_tokens": 5, "max_completion_tokens": 6}, 6)], ids=str
)
def test_max_tokens_of_a_chat(body, max_tokens):
    assert params_of(**body).max_tokens == max_tokens


@pytest.mark.parametrize(
    ("body", "structure"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, {"json_object": True}),
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
    ("body", "error", "match"),
    [
        ({"temprature": 1}, ValueError, "unknown field 'temprature'"),
        ({"prompt": "a"}, ValueError, "unknown field 'prompt'"),
        ({"stream": True}, ValueError, "stream is not served: an answer comes whole; got True"),
        ({"tools": [{"type": "function"}]}, ValueError, "tools is not served"),
        ({"tool_choice": "auto"}, ValueError, "tool_choice is not served"),
        ({"echo": True}, ValueError, "echo is not served"),
        ({"best_of": 2}, ValueError, "best_of is not served"),
        ({"chat_template": "{{ 1 }}"}, ValueError, "chat_template is not served"),
        ({"modalities": ["audio"]}, ValueError, "modalities is not served"),
        ({"temperature": -1}, ValueError, "temperature must be"),
        ({"temperature": "hot"}, TypeError, "temperature must be"),
        ({"max_tokens": 0}, ValueError, "max_tokens must be"),
        ({"n": 0}, ValueError, "n must be"),
        ({"logprobs": 5}, TypeError, "logprobs must be of type bool, got 5"),
        ({"top_logprobs": 5}, ValueError, "top_logprobs=5 needs logprobs=true"),
        ({"logprobs": True, "top_logprobs": -1}, ValueError, "top_logprobs must be"),
        ({"response_format": {"type": "xml"}}, ValueError, "response_format must have the type"),
        ({"response_format": "json"}, ValueError, "response_format must have the type"),
        ({"response_format": {"type": "json_schema"}}, ValueError, "response_format must have the type"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, ValueError, "may be given, got several"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, ValueError, "may be given, got several"),
        ({"guided_regex": 5}, TypeError, "regex must"),
    ],
    ids=str,
)
def test_what_is_refused(body, error, match):
    with pytest.raises(error, match=match):
        params_of(**body)


@pytest.mark.parametrize("body", [None, [], "text", 5], ids=str)
def test_a_body_that_is_no_object(body):
    with pytest.raises(TypeError, match="the body must be an object"):
        checked_body(body, CHAT_FIELDS)


def test_a_completion_asks_for_a_number_of_logprobs():
    with pytest.raises(TypeError, match="logprobs must be a number, got True"):
        params_of(COMPLETION_FIELDS, logprobs=True)


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ["a"]), ([5, 6], [[5, 6]]), (["a", "b"], ["a", "b"]), ([[5], [6, 7]], [[5], [6, 7]])],
    ids=str,
)
def test_prompts_of_a_completion(prompt, prompts):
    assert completion_prompts({"prompt": prompt}) == prompts


@pytest.mark.parametrize(
    ("body", "error"),
    [({}, TypeError), ({"prompt": 5}, TypeError), ({"prompt": ""}, ValueError), ({"prompt": []}, ValueError)],
)
def test_no_prompt(body, error):
    with pytest.raises(error, match="prompt must"):
        completion_prompts(body)


# ---- answers -------------------------------------------------------------------------------------------------------


def result(*samples: dict) -> RequestOutput:
    """A result whose prompt has three tokens, two of which were cached."""
    outputs = []
    for index, sample in enumerate(samples):
        other = {"index": index, "logprobs": None, "stop_reason": None, "finish_reason": "stop"}
        outputs.append(CompletionOutput(other | sample))
    return RequestOutput(prompt_token_ids=[1, 2, 3], num_cached_tokens=2, outputs=outputs)


LOGPROBS = [
    {5: Logprob(-0.5, 1, "a"), 6: Logprob(-1.5, 2, "b")},
    {7: Logprob(-math.inf, 9, "é"), 5: Logprob(-0.1, 1, "a"), 6: Logprob(-2.0, 2, "b")},  # one that was not likely
]
WITH_LOGPROBS = {"text": "aé", "token_ids": [5, 7], "logprobs": LOGPROBS, "finish_reason": "length"}


def test_the_answer_of_a_chat():
    body = chat_body("m", result({"text": "x", "token_ids": [5]}, {"text": "yz", "token_ids": [6, 7]}), None)
    assert body["object"] == "chat.completion" and body["model"] == "m" and body["id"].startswith("chatcmpl-")
    assert [choice["message"]["content"] for choice in body["choices"]] == ["x", "yz"]
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    assert all(choice["message"]["role"] == "assistant" and choice["logprobs"] is None for choice in body["choices"])
    details = {"prompt_tokens_details": {"cached_tokens": 2}}
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6} | details


@pytest.mark.parametrize("num_top", [0, 1, 2])
def test_logprobs_of_a_chat(num_top):
    (choice,) = chat_body("m", result(WITH_LOGPROBS), num_top)["choices"]
    first, second = choice["logprobs"]["content"]
    a, b = ({"token": text, "logprob": p, "bytes": [ord(text)]} for text, p in (("a", -0.5), ("b", -1.5)))
    assert first == a | {"top_logprobs": [a, b][:num_top]}
    assert {name: second[name] for name in a} == {"token": "é", "logprob": -9999.0, "bytes": [0xC3, 0xA9]}
    assert [entry["token"] for entry in second["top_logprobs"]] == ["a", "b"][:num_top]
    json.loads(json.dumps(choice, allow_nan=False))


def test_the_answer_of_a_completion():
    """The prompts' samples one behind the other."""
    results = [result({"text": "x", "token_ids": [5]}), result(WITH_LOGPROBS)]
    body = completion_body("m", results)
    assert body["object"] == "text_completion" and body["id"].startswith("cmpl-")
    assert [(choice["index"], choice["text"]) for choice in body["choices"]] == [(0, "x"), (1, "aé")]
    assert [choice["finish_reason"] for choice in body["choices"]] == ["stop", "length"]
    assert body["choices"][0]["logprobs"] is None
    assert body["choices"][1]["logprobs"] == {
        "tokens": ["a", "é"],
        "token_logprobs": [-0.5, -9999.0],
        "top_logprobs": [{"a": -0.5, "b": -1.5}, {"é": -9999.0, "a": -0.1, "b": -2.0}],
        "text_offset": [0, 1],
    }
    assert body["usage"]["prompt_tokens"] == 6 and body["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize(("status_code", "kind"), [(400, "invalid_request_error"), (500, "server_error")])
def test_errors(status_code, kind):
    assert error_body("bad", status_code)["error"] == {"message": "bad", "type": kind, "param": None, "code": None}
