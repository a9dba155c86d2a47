"""Bodies of OpenAI's /v1/completions and /v1/chat/completions: what prompts and parameters they ask for.

Fields mean what OpenAI's API says, and those that vLLM adds what vLLM says. A null is as good as no field; a field
that is not served is refused by its name. Nothing here knows of engines, files or answers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from nanovllm.chat.prompts import render_conversations
from nanovllm.chat.template import ChatTemplate
from nanovllm.inputs import TokensPrompt
from nanovllm.sampling_params import SamplingParams
from nanovllm.text.tokenizer import Tokenizer
from nanovllm.utils.checks import check

Body = Mapping[str, Any]

SAME_NAME = (  # fields that SamplingParams has under their name
    *("temperature", "top_p", "top_k", "min_p", "n", "seed", "stop", "stop_token_ids", "min_tokens", "ignore_eos"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "bad_words", "allowed_token_ids"),
    *("skip_special_tokens", "spaces_between_special_tokens", "include_stop_str_in_output", "truncate_prompt_tokens"),
    "structured_outputs",
)
GUIDED = {"guided_json": "json", "guided_regex": "regex", "guided_choice": "choice", "guided_grammar": "grammar"}
ABOUT_THE_SENDER = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
COMMON = ("model", "max_tokens", "logprobs", "response_format", "priority", *SAME_NAME, *GUIDED, *ABOUT_THE_SENDER)
COMPLETION_FIELDS = frozenset({"prompt", *COMMON})
RENDER_FIELDS = ("add_generation_prompt", "continue_final_message", "chat_template_kwargs")
CHAT_FIELDS = frozenset({"messages", "max_completion_tokens", "top_logprobs", *RENDER_FIELDS, *COMMON})
REFUSED = {  # fields whose values other than these ask for something that is not here
    "stream": (False, "an answer comes whole"),
    "stream_options": (None, "an answer comes whole"),
    "echo": (False, "the answer does not repeat the prompt"),
    "suffix": (None, "texts are continued at their end"),
    "best_of": (1, "use n, and choose among its texts"),
    "tools": ([], "calls of tools are not read from the answer"),
    "tool_choice": ("none", "calls of tools are not read from the answer"),
    "parallel_tool_calls": (True, "calls of tools are not read from the answer"),
    "modalities": (["text"], "the models take and give text only"),
    "audio": (None, "the models take and give text only"),
    "chat_template": (None, "the model's own is used"),
}
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's, of /v1/completions; an answer in a chat goes as far as the model does


def checked_body(body: object, known: Collection[str]) -> Body:
    """The body without its nulls and the fields that ask for nothing.

    Raises:
        TypeError, ValueError: it is no object, or a field is none of those `known`.
    """
    if not isinstance(body, dict):
        raise TypeError(f"the body must be an object, got {body!r:.200}")
    given = {name: value for name, value in body.items() if value is not None}
    for name, (harmless, reason) in REFUSED.items():
        if name in given and given.pop(name) != harmless:
            raise ValueError(f"{name} is not served: {reason}; got {body[name]!r:.200}")
    for name in given:
        if name not in known:
            raise ValueError(f"unknown field {name!r}")
    return given


def completion_prompts(body: Body) -> list[Any]:
    """The prompts of a completion: OpenAI's field has a text, token ids, or a list of either.

    Raises:
        TypeError, ValueError: there is none; what is in a list is for the engine to check.
    """
    prompt = body.get("prompt")
    if not isinstance(prompt, (str, list)):
        raise TypeError(f"prompt must be a string, a list of token ids, or a list of either, got {prompt!r:.200}")
    if not prompt:
        raise ValueError(f"prompt must not be empty, got {prompt!r}")
    is_one = isinstance(prompt, str) or isinstance(prompt[0], int)
    return [prompt] if is_one else prompt


def sampling_params(body: Body, defaults: SamplingParams) -> SamplingParams:
    """The parameters of a completion, or of a chat if there are messages; `defaults` count where it has none.

    Raises:
        TypeError, ValueError: a field of another type, out of its range, or at odds with another.
    """
    values = {name: body[name] for name in SAME_NAME if name in body}
    is_chat = "messages" in body
    max_tokens = body.get("max_tokens", None if is_chat else DEFAULT_COMPLETION_TOKENS)
    values["max_tokens"] = body.get("max_completion_tokens", max_tokens)
    values["logprobs"] = _chat_logprobs(body) if is_chat else body.get("logprobs")
    if isinstance(values["logprobs"], bool):
        raise TypeError(f"logprobs must be a number, got {values['logprobs']}")
    structures = [{kind: body[name]} for name, kind in GUIDED.items() if name in body]
    if "response_format" in body:
        structures += _structure(body["response_format"])
    if len(structures) + ("structured_outputs" in body) > 1:
        raise ValueError(f"one of response_format, structured_outputs, {', '.join(GUIDED)} may be given, got several")
    if structures:
        values["structured_outputs"] = structures[0]
    return replace(defaults, **values)


def chat_prompt(body: Body, template: ChatTemplate, tokenizer: Tokenizer) -> TokensPrompt:
    """The prompt of a chat.

    Raises:
        TypeError, ValueError: no messages, or what `ChatTemplate.render` refuses.
    """
    messages = body.get("messages")
    if not isinstance(messages, list):
        raise TypeError(f"messages must be a list, got {messages!r:.200}")
    options = {name: body[name] for name in RENDER_FIELDS if name in body}
    (prompt,) = render_conversations(template, tokenizer, [messages], **options)
    return prompt


def _chat_logprobs(body: Body) -> int | None:
    """How many logprobs a chat asks for: `logprobs` says whether, `top_logprobs` of how many likely tokens."""
    is_asked, number = body.get("logprobs", False), body.get("top_logprobs", 0)
    check("logprobs", is_asked, bool)
    check("top_logprobs", number, int, 0)
    if number and not is_asked:
        raise ValueError(f"top_logprobs={number} needs logprobs=true")
    return number if is_asked else None


def _structure(response_format: object) -> list[dict[str, Any]]:
    """The structured_outputs of a response_format; [] for plain text."""
    kind = response_format.get("type") if isinstance(response_format, dict) else None
    if kind == "text":
        return []
    if kind == "json_object":
        return [{"json_object": True}]
    schema = response_format.get("json_schema") if kind == "json_schema" else None
    if isinstance(schema, dict) and isinstance(schema.get("schema"), dict):
        return [{"json": schema["schema"]}]
    raise ValueError(
        "response_format must have the type text, json_object, or json_schema with a json_schema that has a schema, "
        f"got {response_format!r:.200}"
    )
