"""The server, as the official client of OpenAI sees it: the engine's results, in that API's words."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
from contextlib import contextmanager
from typing import Literal

import pytest
from async_engines import check_nothing_left, metric, num_unfinished, watched
from faults import wait_until

import nanovllm
from nanovllm import LLM, AsyncLLM, SamplingParams
from nanovllm.reports.metrics import HELP, PREFIX

for package in ("fastapi", "uvicorn", "prometheus_client", "httpx", "openai"):
    pytest.importorskip(package, reason=f"needs {package}, which the extra [test] brings")
import httpx  # noqa: E402 (needs the packages, as those below)
import openai  # noqa: E402
import pydantic  # noqa: E402
from prometheus_client.parser import text_string_to_metric_families  # noqa: E402
from servers import DEMO, OPTIONS, make_folder, serving  # noqa: E402

from nanovllm.batch.run_batch import run_batch  # noqa: E402

pytestmark = pytest.mark.timeout(120)

PROMPT = "introduce yourself"
CHAT = [{"role": "user", "content": PROMPT}]
ENDLESS = {"temperature": 0, "max_tokens": 2000, "extra_body": {"ignore_eos": True}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris", "days": 2}}\n</tool_call>'


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    with watched(make_folder(tmp_path_factory.mktemp("demo")), **OPTIONS) as engine:
        yield engine


@pytest.fixture(scope="module")
def llm(engine):
    """What the answers are to be compared with."""
    with LLM(engine.config.model, **OPTIONS) as llm:
        yield llm


@pytest.fixture(scope="module")
def url(engine):
    with serving(engine) as url:
        yield url


@pytest.fixture
def client(engine, url):
    """A client, behind which the engine must have nothing left."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client
    check_nothing_left(engine)


def plain(llm: LLM, prompts, **params) -> list:
    return llm.generate(prompts, SamplingParams(**params), use_tqdm=False)


def stream_texts(stream) -> tuple[dict[int, str], dict[int, str], openai.types.CompletionUsage | None]:
    """Each choice's text and end, and the usage, of a stream of completions."""
    texts, ends, usage = {}, {}, None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            assert choice.index not in ends, "a choice ends once"
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            if choice.finish_reason:
                ends[choice.index] = choice.finish_reason
    return texts, ends, usage


def stream_chat(stream) -> dict[str, object]:
    """What the parts of a stream of one chat make up."""
    whole = {"content": "", "reasoning_content": "", "tool_calls": [], "finish_reason": None, "parts": 0}
    for chunk in stream:
        for choice in chunk.choices:
            whole["parts"] += 1
            whole["content"] += choice.delta.content or ""
            whole["reasoning_content"] += getattr(choice.delta, "reasoning_content", None) or ""
            whole["tool_calls"] += choice.delta.tool_calls or []
            whole["finish_reason"] = choice.finish_reason or whole["finish_reason"]
    return whole


# ---- completions ---------------------------------------------------------------------------------------------------


def test_completions_are_those_of_llm(client, llm):
    prompts = [PROMPT, "What is a block table?", "Hello"]
    want = plain(llm, prompts, temperature=0, max_tokens=30)
    got = client.completions.create(model="demo", prompt=prompts, temperature=0, max_tokens=30)
    assert [choice.text for choice in got.choices] == [result.text for result in want]
    assert [choice.finish_reason for choice in got.choices] == [result.finish_reason for result in want]
    assert [choice.index for choice in got.choices] == [0, 1, 2]
    assert got.usage.prompt_tokens == sum(len(result.prompt_token_ids) for result in want)
    assert got.usage.completion_tokens == sum(len(result.token_ids) for result in want)
    assert got.usage.total_tokens == got.usage.prompt_tokens + got.usage.completion_tokens


def test_prompts_of_token_ids(client, llm):
    want = plain(llm, [[5, 6, 7], [8, 9]], temperature=0, max_tokens=8)
    for prompt, number in [([[5, 6, 7], [8, 9]], 2), ([5, 6, 7], 1)]:
        extra = {"return_token_ids": True}
        got = client.completions.create(model="demo", prompt=prompt, temperature=0, max_tokens=8, extra_body=extra)
        assert [choice.token_ids for choice in got.choices] == [result.token_ids for result in want[:number]]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0, "max_tokens": 200},
        {"temperature": 0.9, "seed": 5, "n": 3, "stop": ["e"], "max_tokens": 40},
        {"temperature": 0, "stop": ["demo", "x"], "max_tokens": 50},
        {
            "temperature": 1,
            "seed": 1,
            "presence_penalty": 1.5,
            "frequency_penalty": 0.5,
            "logit_bias": {"70": 5},
            "max_tokens": 30,
        },
        {
            "temperature": 1,
            "seed": 2,
            "extra_body": {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2, "min_tokens": 10},
        },
    ],
    ids=str,
)
def test_parameters_reach_the_engine_streamed_or_not(client, llm, options):
    params = {"max_tokens": 16} | options | options.get("extra_body", {})
    params.pop("extra_body", None)
    (want,) = plain(llm, PROMPT, **params)
    texts = {sample.index: sample.text for sample in want.outputs}
    ends = {sample.index: sample.finish_reason for sample in want.outputs}
    got = client.completions.create(model="demo", prompt=PROMPT, **options)
    assert {choice.index: choice.text for choice in got.choices} == texts
    stream = client.completions.create(
        model="demo", prompt=PROMPT, stream=True, stream_options={"include_usage": True}, **options
    )
    assert stream_texts(stream) == (
        texts,
        ends,
        got.usage.model_copy(update={"prompt_tokens_details": stream_details(got)}),
    )


def stream_details(completion):
    """Details of the usage, but for the tokens that the first call left in the cache for the second."""
    return completion.usage.prompt_tokens_details


def test_streams_of_several_prompts(client, llm):
    prompts = [PROMPT, "Hello", "What is a block table?"]
    want = plain(llm, prompts, temperature=0, max_tokens=12)
    stream = client.completions.create(model="demo", prompt=prompts, temperature=0, max_tokens=12, stream=True)
    texts, ends, usage = stream_texts(stream)
    assert [texts[index] for index in range(3)] == [result.text for result in want]
    assert len(ends) == 3 and usage is None


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_completions(client, llm, stream):
    (want,) = plain(llm, PROMPT, temperature=0, max_tokens=6, logprobs=2)
    got = client.completions.create(
        model="demo", prompt=PROMPT, temperature=0, max_tokens=6, logprobs=2, stream=stream
    )
    parts = [chunk.choices[0].logprobs for chunk in got] if stream else [got.choices[0].logprobs]
    entries = want.outputs[0].logprobs
    own = [next(iter(entry.values())) for entry in entries]
    assert [token for part in parts for token in part.tokens] == [logprob.decoded_token for logprob in own]
    assert [value for part in parts for value in part.token_logprobs] == pytest.approx([o.logprob for o in own])
    tops = [{logprob.decoded_token: pytest.approx(logprob.logprob) for logprob in e.values()} for e in entries]
    assert [top for part in parts for top in part.top_logprobs] == tops
    offsets = [offset for part in parts for offset in part.text_offset]
    assert [want.text[offset:].startswith(o.decoded_token) for offset, o in zip(offsets, own, strict=True)] == [
        True
    ] * 6


@pytest.mark.parametrize("stream", [False, True])
def test_echoed_prompts(client, llm, stream):
    """As lm-evaluation-harness asks for them: the prompt's logprobs stand before the answer's."""
    options = {"model": "demo", "temperature": 0, "max_tokens": 2, "echo": True}
    for prompt in (PROMPT, [5, 6, 7]):
        (want,) = plain(llm, [prompt], temperature=0, max_tokens=2, logprobs=1, prompt_logprobs=1)
        text = llm.tokenizer.decode(want.prompt_token_ids) + want.text
        got = client.completions.create(**options, prompt=prompt, logprobs=1, stream=stream)
        choices = [chunk.choices[0] for chunk in (got if stream else [got])]
        assert "".join(choice.text for choice in choices) == text
        parts = [choice.logprobs.model_dump() for choice in choices]
        told = {name: [value for part in parts for value in part[name]] for name in parts[0]}
        own = [next(iter(entry.values())) for entry in want.prompt_logprobs[1:] + want.outputs[0].logprobs]
        assert told["tokens"] == list(map(llm.tokenizer.token_text, want.prompt_token_ids + want.token_ids))
        assert told["token_logprobs"] == [None, *(pytest.approx(logprob.logprob) for logprob in own)]
        assert [top is None for top in told["top_logprobs"]] == [True, *(False for _ in own)]
        for offset, token in zip(told["text_offset"], told["tokens"], strict=True):
            assert text[offset:].startswith(token)
        (choice,) = client.completions.create(**options, prompt=prompt).choices
        assert choice.text == text and choice.logprobs is None


# ---- chats ---------------------------------------------------------------------------------------------------------


def test_chats_are_those_of_llm(client, llm):
    (want,) = llm.chat(CHAT, SamplingParams(temperature=0, max_tokens=None), use_tqdm=False)
    got = client.chat.completions.create(model="demo", messages=CHAT, temperature=0)
    assert got.choices[0].message.content == want.text and got.choices[0].message.role == "assistant"
    assert got.choices[0].finish_reason == want.finish_reason == "stop"
    assert got.usage.prompt_tokens == len(want.prompt_token_ids)
    parts = [{"type": "text", "text": PROMPT}]
    stream = client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": parts}], temperature=0, stream=True
    )
    streamed = stream_chat(stream)
    assert streamed["content"] == want.text and streamed["finish_reason"] == "stop" and streamed["parts"] > 5
    again = client.chat.completions.create(model="demo", messages=CHAT, temperature=0, max_completion_tokens=3)
    assert again.usage.completion_tokens == 3 and again.usage.prompt_tokens_details.cached_tokens >= 16


def test_logprobs_of_chats(client, llm):
    (want,) = llm.chat(CHAT, SamplingParams(temperature=0, max_tokens=5, logprobs=3), use_tqdm=False)
    options = {"model": "demo", "messages": CHAT, "temperature": 0, "max_tokens": 5, "logprobs": True}
    got = client.chat.completions.create(**options, top_logprobs=3).choices[0].logprobs.content
    for entry, logprobs in zip(got, want.outputs[0].logprobs, strict=True):
        own = next(iter(logprobs.values()))
        assert entry.token == own.decoded_token and bytes(entry.bytes).decode() == entry.token
        assert entry.logprob == pytest.approx(own.logprob)
        best = sorted(logprobs.values(), key=lambda logprob: logprob.rank)[:3]
        assert [top.token for top in entry.top_logprobs] == [logprob.decoded_token for logprob in best]
    stream = client.chat.completions.create(**options, stream=True)
    streamed = [entry for chunk in stream for entry in chunk.choices[0].logprobs.content]
    assert [entry.token for entry in streamed] == [entry.token for entry in got]
    assert all(entry.top_logprobs == [] for entry in streamed)


@pytest.fixture(scope="module")
def not_spaces(engine):
    """A bias against what the demo, that knows no JSON, would write without end."""
    texts = map(engine.tokenizer.token_text, range(3328))
    return {token_id: -100 for token_id, text in enumerate(texts) if text.isspace()}


def test_answers_of_a_form(client, not_spaces):
    class Answer(pydantic.BaseModel):
        city: Literal["Rome", "Paris"]
        days: Literal[1, 2, 3]

    got = client.chat.completions.parse(
        model="demo", messages=CHAT, response_format=Answer, temperature=0, logit_bias=not_spaces
    )
    assert isinstance(got.choices[0].message.parsed, Answer)
    for extra, pattern in [
        ({"guided_choice": ["yes", "no"]}, "yes|no"),
        ({"guided_regex": "[a-c]{3}"}, "[a-c]{3}"),
        ({"structured_outputs": {"choice": ["maybe"]}}, "maybe"),
        ({"guided_grammar": 'root ::= "x" | "y"'}, "x|y"),
    ]:
        got = client.chat.completions.create(model="demo", messages=CHAT, extra_body=extra)
        assert re.fullmatch(pattern, got.choices[0].message.content)
        got = client.completions.create(model="demo", prompt="a", extra_body=extra)
        assert re.fullmatch(pattern, got.choices[0].text)
    schema = {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"], "additionalProperties": False}
    extra = {"guided_json": schema}
    got = client.completions.create(model="demo", prompt="a", max_tokens=60, logit_bias=not_spaces, extra_body=extra)
    assert json.loads(got.choices[0].text) == {"a": 1}


@pytest.mark.parametrize("stream", [False, True])
def test_calls_of_tools(client, stream):
    def ask(text: str, **options):
        extra = {"guided_choice": [text]}
        got = client.chat.completions.create(
            model="demo", messages=CHAT, temperature=0, stream=stream, extra_body=extra, **options
        )
        if stream:
            whole = stream_chat(got)
            return whole["content"] or None, whole["tool_calls"], whole["finish_reason"]
        choice = got.choices[0]
        return choice.message.content, choice.message.tool_calls or [], choice.finish_reason

    content, calls, reason = ask(f"Let me see. {CALL}\n{CALL}", tools=TOOLS)
    assert content == "Let me see." and reason == "tool_calls" and len({call.id for call in calls}) == 2
    for call in calls:
        assert call.type == "function" and call.function.name == "weather"
        assert json.loads(call.function.arguments) == {"city": "Paris", "days": 2}
    assert ask(CALL, tools=TOOLS)[0] is None
    assert ask(CALL, tools=TOOLS, tool_choice="none") == (CALL, [], "stop")
    assert ask(CALL) == (CALL, [], "stop")
    assert len(ask(f"{CALL}\n{CALL}", tools=TOOLS, parallel_tool_calls=False)[1]) == 1


class Days(pydantic.BaseModel):
    count: Literal[1, 2]


class Weather(pydantic.BaseModel):
    city: Literal["Rome", "Paris"]
    days: Days  # which the schema refers to


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("is_thinking", [False, True])
def test_a_tool_that_must_be_called(client, not_spaces, stream, is_thinking):
    """As pydantic's, LangChain's and other clients get objects."""
    named = {"type": "function", "function": {"name": "Weather"}}
    now = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
    for choice, tools in [("required", [now]), (named, [now, openai.pydantic_function_tool(Weather)])]:
        got = client.chat.completions.create(
            model="demo", messages=CHAT, tools=tools, tool_choice=choice, stream=stream, logit_bias=not_spaces,
            extra_body={"chat_template_kwargs": {"enable_thinking": is_thinking}},
        )  # fmt: skip
        if stream:
            whole = stream_chat(got)
            content, calls, reason = whole["content"], whole["tool_calls"], whole["finish_reason"]
        else:
            message, reason = got.choices[0].message, got.choices[0].finish_reason
            content, calls = message.content, message.tool_calls
        (call,) = calls
        assert not content and reason == "tool_calls"
        assert call.function.name == tools[-1]["function"]["name"]
        if choice == "required":
            assert json.loads(call.function.arguments) == {}
        else:
            assert isinstance(Weather.model_validate_json(call.function.arguments), Weather)


def test_the_template_tells_of_tools(client):
    def num_prompt_tokens(**options) -> int:
        got = client.chat.completions.create(model="demo", messages=CHAT, max_tokens=1, **options)
        return got.usage.prompt_tokens

    assert num_prompt_tokens(tools=TOOLS) > num_prompt_tokens() == num_prompt_tokens(tools=TOOLS, tool_choice="none")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("is_opened", [False, True])
def test_reasoning_is_split_off(client, stream, is_opened):
    text = "let me think\n</think>\n\nparis" if is_opened else "<think>\nlet me think\n</think>\n\nparis"
    extra = {"guided_choice": [text], "chat_template_kwargs": {"enable_thinking": is_opened}}
    got = client.chat.completions.create(model="demo", messages=CHAT, stream=stream, extra_body=extra)
    if stream:
        whole = stream_chat(got)
        reasoning, content = whole["reasoning_content"], whole["content"]
    else:
        reasoning, content = got.choices[0].message.reasoning_content, got.choices[0].message.content
    assert (reasoning, content) == ("let me think", "paris")


def test_a_form_leaves_no_room_for_reasoning(client):
    extra = {"guided_choice": ["yes", "no"], "chat_template_kwargs": {"enable_thinking": True}}
    got = client.chat.completions.create(model="demo", messages=CHAT, extra_body=extra)
    assert got.choices[0].message.content in ("yes", "no")


def test_the_asynchronous_client(url, llm):
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
            calls = [client.completions.create(model="demo", prompt=[i, 5, 6], temperature=0) for i in range(40)]
            return [answer.choices[0].text for answer in await asyncio.gather(*calls)]

    want = plain(llm, [[i, 5, 6] for i in range(40)], temperature=0, max_tokens=16)
    assert asyncio.run(ask()) == [result.text for result in want]


def test_batches_are_answered_alike(client, llm, url, tmp_path):
    """Tools, reasoning and logprobs are those of the same requests to the server."""
    thinking = {"guided_choice": ["<think>\nlet me think\n</think>\n\nparis"]}
    bodies = [
        {"messages": CHAT, "guided_choice": [f"Let me see. {CALL}"], "top_k": 1, "tools": TOOLS},
        {"messages": CHAT, "guided_choice": [CALL], "top_k": 1, "tools": TOOLS, "tool_choice": "none"},
        {"messages": CHAT, "n": 2, "top_k": 1, "max_tokens": 30, "logprobs": True, "top_logprobs": 2} | thinking,
        {"prompt": ["a", [5, 6]], "n": 2, "top_k": 1, "max_tokens": 9, "logprobs": 3, "return_token_ids": True},
        {"prompt": "a", "tools": TOOLS},
        {"messages": CHAT, "tool_choice": "required"},
        {"prompt": ["a", [5, 6]], "top_k": 1, "logprobs": 1, "echo": True},
        {"messages": CHAT, "model": "other"},
        {"prompt": "a", "priority": 3},
    ]
    urls = ["/v1/chat/completions" if "messages" in body else "/v1/completions" for body in bodies]
    want = [httpx.post(url + path, json=body).json() for path, body in zip(urls, bodies, strict=True)]
    lines = [{"custom_id": str(index), "url": urls[index], "body": body} for index, body in enumerate(bodies)]
    (tmp_path / "in").write_text("\n".join(map(json.dumps, lines)))
    run_batch(llm, tmp_path / "in", tmp_path / "out", "demo", use_tqdm=False)
    records = sorted(map(json.loads, (tmp_path / "out").read_text().splitlines()), key=lambda each: each["custom_id"])
    got = [record["response"]["body"] for record in records]
    for index, body in enumerate(got):
        if "error" in body:
            body["error"]["message"] = body["error"]["message"].removeprefix(f"line {index + 1}: ")
    assert [plainly(body) for body in got] == [plainly(body) for body in want]
    assert got[0]["choices"][0]["message"]["tool_calls"] and got[2]["choices"][1]["message"]["reasoning_content"]


def plainly(body: object) -> object:
    """An answer without what is random, or depends on the time or on earlier requests."""
    if isinstance(body, list):
        return list(map(plainly, body))
    if not isinstance(body, dict):
        return pytest.approx(body, abs=1e-2) if isinstance(body, float) else body
    hidden = ("id", "created", "prompt_tokens_details")
    return {name: plainly(value) for name, value in body.items() if name not in hidden}


# ---- mistakes ------------------------------------------------------------------------------------------------------


BAD_COMPLETIONS = [
    ({"max_tokens": 0}, "max_tokens"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"n": 200}, "n"),
    ({"logprobs": 100}, "logprobs"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [["a"]]}, "prompt"),
    ({"prompt": [5000]}, "token ids"),
    ({"prompt": [5] * 3000}, "max_model_len"),
    ({"echo": True, "logprobs": 21}, "logprobs"),
    ({"suffix": "end"}, "suffix is not supported"),
    ({"best_of": 3}, "best_of"),
    ({"prompt_logprobs": 1}, "prompt_logprobs is not supported"),
    ({"stream_options": {"foo": 1}}, "stream_options.foo is not supported"),
    ({"guided_regex": "["}, "regex"),
    ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_regex, guided_choice"),
    ({"response_format": {"type": "xml"}}, "response_format"),
    ({"structured_outputs": {"foo": 1}}, "foo"),
    ({"stop": [""]}, "stop"),
    ({"logit_bias": {"9999": 1}}, "logit_bias"),
    ({"priority": 1}, "priority=1 needs"),
    ({"priority": "high"}, "priority: "),
]
BAD_CHATS = [
    ({"messages": []}, "messages"),
    ({"messages": [{"content": "a"}]}, "role"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://a"}}]}]}, "text"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": {"type": "function", "function": {"name": "weather"}}}, "tool_choice"),
    ({"tool_choice": "required", "tools": TOOLS, "guided_choice": ["a"]}, "tool_choice='required' gives"),
    ({"tools": [{}]}, "tools: each must have a function"),
    ({"chat_template": "{{ 7 * 7 }}"}, "chat_template is not supported"),
    ({"chat_template_kwargs": {"chat_template": "{{ 7 * 7 }}"}}, "chat_template"),
    ({"functions": []}, "functions is not supported"),
    ({"top_logprobs": 2}, "logprobs"),
    ({"modalities": ["audio"]}, "modalities"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "fields", "words"),
    [
        *(("completions", fields, words) for fields, words in BAD_COMPLETIONS),
        *(("chat/completions", fields, words) for fields, words in BAD_CHATS),
    ],
)
def test_mistakes_are_named(client, url, engine, path, fields, words, stream):
    body = {"stream": stream} | ({"prompt": "a"} if path == "completions" else {"messages": CHAT}) | fields
    response = httpx.post(f"{url}/v1/{path}", json=body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert words in error["message"] and error["type"] == "invalid_request_error" and set(error) == ERROR_KEYS
    check_shows_no_path(response.text, engine)


ERROR_KEYS = {"message", "type", "param", "code"}


def check_shows_no_path(text: str, engine: AsyncLLM) -> None:
    for path in (engine.config.model, nanovllm.__path__[0], "site-packages"):
        assert path not in text


def test_errors_of_the_client(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="demo", prompt="a", temperature=-1)
    assert "temperature" in str(caught.value) and caught.value.status_code == 400
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="other", prompt="a")
    assert caught.value.code == "model_not_found" and caught.value.param == "model"
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="demo", input="a")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


@pytest.mark.parametrize(
    ("content", "headers"),
    [
        (b'{"prompt": "a', {}),
        (b"", {}),
        (b"[1]", {}),
        (b"\xff\xfe", {}),
        (b'{"prompt": "a"}', {"content-type": "text/plain"}),
        (b'{"prompt": "a"}', {"content-type": "application/x-www-form-urlencoded"}),
        (b'{"prompt":' + b"[" * 100_000, {}),
        (b'{"prompt": "a", "temperature": NaN}', {}),
        (b'{"prompt": "\\ud800"}', {}),
        (b'{"prompt": "a", "bad_words": ["\\ud800"]}', {}),
        (b'{"prompt": "a", "guided_json": ' + b'{"items":' * 800 + b"{}" + b"}" * 801, {}),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_malformed_bodies(client, url, content, headers):
    headers = {"content-type": "application/json"} | headers
    response = httpx.post(f"{url}/v1/completions", content=content, headers=headers)
    assert response.status_code == 400 and set(response.json()["error"]) == ERROR_KEYS
    assert ("Content-Type" in response.text) == (headers["content-type"] != "application/json")


def test_huge_bodies(client, url):
    def chunks():
        for _ in range(40):
            yield b" " * 65536

    headers = {"content-type": "application/json"}
    for content in (b" " * (2**20 + 1), chunks()):
        response = httpx.post(f"{url}/v1/completions", content=content, headers=headers)
        assert response.status_code == 413 and "1048576 bytes" in response.json()["error"]["message"]
    response = httpx.post(f"{url}/v1/completions", json={"prompt": "many words " * 50_000})
    assert response.status_code == 400 and "max_model_len" in response.json()["error"]["message"]
    assert client.completions.create(model="demo", prompt="a").choices


def test_unknown_paths_and_methods(url):
    for response, status in [
        (httpx.get(f"{url}/v1/files"), 404),
        (httpx.get(f"{url}/v1/completions"), 405),
        (httpx.get(f"{url}/docs"), 404),
        (httpx.get(f"{url}/static/../../config.py"), 404),
    ]:
        assert response.status_code == status and set(response.json()["error"]) == ERROR_KEYS
        assert "access-control-allow-origin" not in response.headers


def test_a_request_that_fails_while_it_runs(client, engine, url):
    """As one whose logits are not finite does: its parameters leave it no third token."""
    (token_id,) = engine.tokenizer.encode("a")
    limits = {"allowed_token_ids": [token_id], "bad_words": ["aaa"], "ignore_eos": True}
    options = ENDLESS | {"extra_body": limits}
    with pytest.raises(openai.InternalServerError) as caught:
        client.completions.create(model="demo", prompt="x", **options)
    assert "no finite maximum" in str(caught.value)
    check_shows_no_path(str(caught.value), engine)
    texts = []
    with pytest.raises(openai.APIError, match="no finite maximum"):
        for chunk in client.completions.create(model="demo", prompt="x", stream=True, **options):
            texts.append(chunk.choices[0].text)
    assert "aa".startswith("".join(texts)), "what has not been read when it fails is lost"


def test_a_bad_prompt_among_several_ends_a_stream_by_an_error(client):
    with pytest.raises(openai.APIError, match="max_model_len"):
        list(client.completions.create(model="demo", prompt=["a", "b" * 9000], stream=True, **ENDLESS))


# ---- keys and bounds -----------------------------------------------------------------------------------------------


def test_api_keys(engine):
    with serving(engine, api_keys=["one", "zwö"]) as url:
        for key, status in [("one", 200), ("zwö", 200), ("on", 401), ("onee", 401)]:
            headers = {"authorization": f"Bearer {key}".encode()}
            assert httpx.get(f"{url}/v1/models", headers=headers).status_code == status
        for path in ("/v1/models", "/metrics", "/version", "/tokenize", "/unknown"):
            response = httpx.get(f"{url}{path}")
            assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
        assert httpx.get(f"{url}/v1/models", headers={"authorization": "Basic one"}).status_code == 401
        assert httpx.get(f"{url}/health").status_code == httpx.get(f"{url}/").status_code == 200
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="two", max_retries=0)
        with client, pytest.raises(openai.AuthenticationError):
            client.completions.create(model="demo", prompt="a")


def test_names_that_others_could_have_lead_here(engine):
    """As a page of evil.example does, once that name's address is 127.0.0.1 (DNS rebinding)."""
    with serving(engine) as url, serving(engine, api_keys=["one"]) as guarded:
        for host in ("localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]:8000", "10.1.2.3", "mine", "a.internal"):
            assert httpx.get(f"{url}/v1/models", headers={"host": host}).status_code == 200
        for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example", "[", ""):
            for path in ("/", "/v1/models"):
                response = httpx.get(f"{url}{path}", headers={"host": host})
                assert response.status_code == 403 and "--api-key" in response.json()["error"]["message"]
        headers = {"host": "my.example", "authorization": "Bearer one"}
        assert httpx.get(f"{guarded}/v1/models", headers=headers).status_code == 200


def test_more_requests_than_may_wait(engine):
    with (
        serving(engine, max_waiting_requests=2) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        streams = [client.completions.create(model="demo", prompt=[5] * 16, stream=True, **ENDLESS)]
        next(iter(streams[0]))
        with pytest.raises(openai.RateLimitError):
            client.completions.create(model="demo", prompt=["a"] * 9, n=2, temperature=1)
        for number in (19, 100_000):  # which can never be served
            with pytest.raises(openai.BadRequestError, match=f"at most 18 prompts.*got {number}"):
                client.completions.create(model="demo", prompt=["a"] * number)
        with pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(model="demo", prompt=["a"] * 18)
        assert caught.value.response.headers["retry-after"] == "1" and caught.value.code == "rate_limit_exceeded"
        assert len(client.completions.create(model="demo", prompt=["a"] * 17).choices) == 17
        streams[0].close()
    check_nothing_left(engine)


# ---- clients that leave, or are slow -------------------------------------------------------------------------------


def test_a_client_that_gives_up_waiting(client, engine):
    before = count_aborts(engine)
    with pytest.raises(openai.APITimeoutError):
        client.completions.create(model="demo", prompt=["a"] * 40, timeout=0.3, **ENDLESS)
    check_nothing_left(engine)
    assert count_aborts(engine) == before + 40


def count_aborts(engine: AsyncLLM) -> float:
    return metric(engine, "request_success", "abort")


@pytest.mark.parametrize("num_chunks", [1, 5])
def test_a_client_that_vanishes_in_mid_stream(client, engine, num_chunks):
    before = count_aborts(engine)
    stream = client.chat.completions.create(model="demo", messages=CHAT, stream=True, **ENDLESS)
    for _ in range(num_chunks):
        next(iter(stream))
    assert num_unfinished(engine)
    stream.close()
    check_nothing_left(engine)
    assert count_aborts(engine) == before + 1


@contextmanager
def unread_stream(url: str, max_tokens: int):
    """The socket of a client that asks for a stream and does not read it."""
    address = url.removeprefix("http://").split(":")
    body = json.dumps({"prompt": [5], "temperature": 0, "ignore_eos": True, "stream": True, "max_tokens": max_tokens})
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(60)
        client.connect((address[0], int(address[1])))
        head = "POST /v1/completions HTTP/1.1\r\nConnection: close\r\nContent-Type: application/json\r\n"
        client.sendall(f"{head}Host: localhost\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
        yield client


def read_all(client: socket.socket) -> str:
    received = b""
    while data := client.recv(65536):
        received += data
    texts = re.findall(r'"text":("(?:[^"\\]|\\.)*")', received.decode())
    assert received.decode().count("data: [DONE]") == 1
    return "".join(map(json.loads, texts))


@pytest.mark.slow
def test_a_slow_reader_delays_nobody_and_loses_nothing(client, engine, llm, url):
    with unread_stream(url, 1500) as slow:
        assert wait_until(lambda: len(engine.streams) == 1, 10)
        for _ in range(3):
            client.completions.create(model="demo", prompt="a", temperature=0)
        assert wait_until(lambda: not num_unfinished(engine), 60)
        (want,) = plain(llm, [[5]], temperature=0, ignore_eos=True, max_tokens=1500)
        assert read_all(slow) == want.text


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_thousand_slow_readers(client, engine, llm, url):
    (want,) = plain(llm, [[5]], temperature=0, ignore_eos=True, max_tokens=20)
    texts = []

    def read_slowly() -> None:
        with unread_stream(url, 20) as slow:
            assert readers_go_on.wait(500)
            texts.append(read_all(slow))

    readers_go_on = threading.Event()
    readers = [threading.Thread(target=read_slowly) for _ in range(1000)]
    for reader in readers:
        reader.start()
    assert client.completions.create(model="demo", prompt="a", temperature=0).choices
    assert wait_until(lambda: not num_unfinished(engine) and not engine.streams, 400)
    readers_go_on.set()
    for reader in readers:
        reader.join()
    assert texts == [want.text] * 1000


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_thousand_requests_half_of_them_cancelled(client, llm, url):
    async def ask(http: httpx.AsyncClient, slots: asyncio.Semaphore, index: int, want: list[str]) -> str:
        body = {"prompt": [index % 50 + 2, 5], "temperature": 0, "ignore_eos": True, "max_tokens": 30}
        async with slots:  # httpx itself is slow with many requests at once
            call = asyncio.create_task(http.post("/v1/completions", json=body))
            if index % 2:
                await asyncio.sleep(index % 97 / 50)
                call.cancel()
            try:
                response = await call
            except asyncio.CancelledError:
                return "cancelled"
        assert response.status_code == 200 and response.json()["choices"][0]["text"] == want[index % 50]
        return "finished"

    async def ask_all(want: list[str]) -> list[str]:
        slots = asyncio.Semaphore(100)
        async with httpx.AsyncClient(base_url=url, timeout=300) as http:
            return await asyncio.gather(*(ask(http, slots, index, want) for index in range(2000)))

    results = plain(llm, [[i + 2, 5] for i in range(50)], temperature=0, ignore_eos=True, max_tokens=30)
    ends = asyncio.run(ask_all([result.text for result in results]))
    assert ends.count("finished") >= 1000 and ends.count("cancelled") > 100


# ---- other routes --------------------------------------------------------------------------------------------------


def test_models_version_and_health(client, url, engine):
    (model,) = client.models.list().data
    assert model.id == "demo" and model.max_model_len == engine.config.max_model_len
    assert client.models.retrieve("demo").id == "demo"
    assert httpx.get(f"{url}/version").json() == {"version": nanovllm.__version__}
    assert httpx.get(f"{url}/health").status_code == 200


def test_tokens(url, engine, llm):
    tokenizer = engine.tokenizer
    got = httpx.post(f"{url}/tokenize", json={"prompt": PROMPT, "return_token_strs": True}).json()
    assert got["tokens"] == tokenizer.encode(PROMPT) and got["count"] == len(got["tokens"])
    assert "".join(got["token_strs"]) == PROMPT and got["max_model_len"] == engine.config.max_model_len
    assert httpx.post(f"{url}/detokenize", json={"tokens": got["tokens"]}).json() == {"prompt": PROMPT}
    chat = httpx.post(f"{url}/tokenize", json={"messages": CHAT}).json()["tokens"]
    (result,) = llm.chat(CHAT, SamplingParams(max_tokens=1), use_tqdm=False)
    assert chat == result.prompt_token_ids
    for body in ({}, {"prompt": "a", "messages": CHAT}, {"prompt": 5}):
        assert httpx.post(f"{url}/tokenize", json=body).status_code == 400
    assert httpx.post(f"{url}/detokenize", json={"tokens": [-1]}).status_code == 400


def test_metrics(client, url, engine):
    def read() -> dict[tuple, float]:
        families = text_string_to_metric_families(httpx.get(f"{url}/metrics").text)
        samples = [sample for family in families for sample in family.samples]
        assert all(sample.labels.pop("model_name") == "demo" for sample in samples)
        return {(sample.name.removeprefix(PREFIX), *sample.labels.values()): sample.value for sample in samples}

    before = read()
    client.completions.create(model="demo", prompt=[5, 6, 7], max_tokens=9, extra_body={"ignore_eos": True})
    after = read()
    grown = {name: value - before[name] for name, value in after.items()}
    assert grown["generation_tokens_total",] == 9 and grown["prompt_tokens_total",] == 3
    assert grown["request_success_total", "length"] == 1
    assert grown["time_to_first_token_seconds_count",] == grown["e2e_request_latency_seconds_bucket", "+Inf"] == 1
    names = {name.removesuffix("_total").removesuffix("_bucket") for name, *_ in after}
    assert set(HELP) <= names


@pytest.mark.slow
def test_urgent_requests_go_first(tmp_path):
    options = OPTIONS | {"max_num_seqs": 1, "scheduling_policy": "priority"}
    ended, body = [], {"prompt": "a", "max_tokens": 500, "temperature": 0, "ignore_eos": True}
    with watched(make_folder(tmp_path), **options) as engine, serving(engine) as url:

        def ask(priority: int) -> None:
            httpx.post(f"{url}/v1/completions", json=body | {"priority": priority}, timeout=60).raise_for_status()
            ended.append(priority)

        threads = [threading.Thread(target=ask, args=(priority,)) for priority in (2, 3, 1)]
        for number, thread in enumerate(threads, 1):
            thread.start()
            assert wait_until(lambda number=number: num_unfinished(engine) == number, 20)
        for thread in threads:
            thread.join()
    assert ended == [2, 1, 3], "the first has the only row"


def test_a_model_without_a_tokenizer():
    options = OPTIONS | {"skip_tokenizer_init": True}
    with LLM(DEMO, **options) as llm, watched(DEMO, **options) as engine, serving(engine) as url:
        (want,) = plain(llm, [[5, 6]], temperature=0, max_tokens=7, ignore_eos=True)
        body = {"prompt": [5, 6], "temperature": 0, "max_tokens": 7, "ignore_eos": True, "return_token_ids": True}
        (choice,) = httpx.post(f"{url}/v1/completions", json=body | {"logprobs": 1}).json()["choices"]
        assert choice["token_ids"] == want.token_ids and choice["text"] == ""
        assert choice["logprobs"]["tokens"] == [f"token_id:{token_id}" for token_id in want.token_ids]
        for path, wrong in [
            ("v1/completions", {"prompt": "a"}),
            ("v1/chat/completions", {"messages": CHAT}),
            ("tokenize", {"prompt": "a"}),
            ("detokenize", {"tokens": [1]}),
        ]:
            response = httpx.post(f"{url}/{path}", json=wrong)
            assert response.status_code == 400 and "tokenizer" in response.json()["error"]["message"]


def test_a_dead_engine(tmp_path):
    with watched(make_folder(tmp_path), **OPTIONS) as engine, serving(engine) as url:
        engine.close()
        for response in (
            httpx.get(f"{url}/health"),
            httpx.get(f"{url}/metrics"),
            httpx.post(f"{url}/v1/completions", json={"prompt": "a"}),
        ):
            assert response.status_code == 503 and response.json()["error"]["type"] == "server_error"
