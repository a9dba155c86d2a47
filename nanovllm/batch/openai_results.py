"""Results in the form of OpenAI's answers. Nothing here knows of engines, files or requests."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from nanovllm.outputs import CompletionOutput, Logprob, Logprobs, RequestOutput

LEAST_LOGPROB = -9999.0  # JSON has no infinity; the number is vLLM's


def completion_body(model: str, results: Sequence[RequestOutput]) -> dict[str, Any]:
    """The answer of /v1/completions to the prompts that have these results, one behind the other."""
    outputs = [output for result in results for output in result.outputs]
    choices = [
        {
            "index": index,
            "text": output.text,
            "logprobs": _completion_logprobs(output),
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
        }
        for index, output in enumerate(outputs)
    ]
    return _body("cmpl", "text_completion", model, choices, results)


def chat_body(model: str, result: RequestOutput, num_top: int | None) -> dict[str, Any]:
    """The answer of /v1/chat/completions; of a token, the logprobs of so many most likely ones are told."""
    choices = [
        {
            "index": output.index,
            "message": {"role": "assistant", "content": output.text, "refusal": None},
            "logprobs": _chat_logprobs(output, num_top),
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
        }
        for output in result.outputs
    ]
    return _body("chatcmpl", "chat.completion", model, choices, [result])


def error_body(message: str, status_code: int) -> dict[str, Any]:
    """OpenAI's error, of a request that was bad (400) or that failed (500)."""
    kind = "invalid_request_error" if status_code == 400 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


def _body(
    prefix: str, kind: str, model: str, choices: list[dict[str, Any]], results: Sequence[RequestOutput]
) -> dict[str, Any]:
    num_prompt = sum(len(result.prompt_token_ids) for result in results)
    num_generated = sum(len(output.token_ids) for result in results for output in result.outputs)
    usage = {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_generated,
        "total_tokens": num_prompt + num_generated,
        "prompt_tokens_details": {"cached_tokens": sum(result.num_cached_tokens for result in results)},
    }
    head = {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}
    return {**head, "choices": choices, "usage": usage, "system_fingerprint": None}


def _chat_logprobs(output: CompletionOutput, num_top: int | None) -> dict[str, Any] | None:
    if output.logprobs is None:
        return None
    content = [
        _spelled(entry[token_id]) | {"top_logprobs": [_spelled(best) for best in _most_likely(entry)[:num_top]]}
        for token_id, entry in zip(output.token_ids, output.logprobs, strict=True)
    ]
    return {"content": content, "refusal": None}


def _completion_logprobs(output: CompletionOutput) -> dict[str, Any] | None:
    if output.logprobs is None:
        return None
    own = [entry[token_id] for token_id, entry in zip(output.token_ids, output.logprobs, strict=True)]
    tokens = [logprob.decoded_token for logprob in own]
    return {
        "tokens": tokens,
        "token_logprobs": [_finite(logprob.logprob) for logprob in own],
        "top_logprobs": [
            {logprob.decoded_token: _finite(logprob.logprob) for logprob in entry.values()}
            for entry in output.logprobs
        ],
        "text_offset": [sum(map(len, tokens[:index])) for index in range(len(tokens))],
    }


def _most_likely(entry: Logprobs) -> list[Logprob]:
    """What is told of a position, the most likely token first."""
    return sorted(entry.values(), key=lambda logprob: -logprob.logprob)


def _spelled(logprob: Logprob) -> dict[str, Any]:
    text = logprob.decoded_token
    return {"token": text, "logprob": _finite(logprob.logprob), "bytes": list(text.encode())}


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)
