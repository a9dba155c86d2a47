"""Outputs of an engine, as OpenAI's API spells them. Nothing here knows of engines or HTTP.

A choice is one sample of one prompt. Its parts are built alike, whether one holds all of it or a stream brings many.
"""

import time
import uuid
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

from nanovllm.openai_api.parsing import END_OF_THINK, THINK, AnswerParser
from nanovllm.openai_api.protocol import ChatRequest, CompletionRequest
from nanovllm.outputs import CompletionOutput, Logprob, Logprobs, RequestOutput
from nanovllm.text.tokenizer import Tokenizer

GenerationBody = CompletionRequest | ChatRequest
LOWEST_LOGPROB = -9999.0  # JSON has no infinity


class CompletionChoice:
    """A choice of a completion."""

    whole_object = part_object = "text_completion"
    id_prefix = "cmpl-"

    def __init__(
        self, body: CompletionRequest, index: int, output: RequestOutput, tokenizer: Tokenizer | None
    ) -> None:
        """The choice `index` of an answer, for the prompt of an output."""
        self.body = body
        self.index = index
        self.tokenizer = tokenizer
        self.echoed = output if body.echo else None  # whose prompt is yet to be told
        self.num_chars = 0  # of the tokens so far, for the offsets of the next ones

    def part(self, sample: CompletionOutput, is_whole: bool) -> dict[str, Any]:
        """What a sample's output says."""
        text, logprobs = sample.text, None
        if self.echoed is not None:
            text, logprobs = self._echo(self.echoed)
            text, self.echoed = text + sample.text, None
        if sample.logprobs is not None:
            new = self._logprobs(sample.logprobs)
            logprobs = new if logprobs is None else {name: logprobs[name] + new[name] for name in new}
        choice = {"index": self.index, "text": text, "logprobs": logprobs}
        return choice | ending(sample, sample.finish_reason) | token_ids(sample, self.body)

    def _echo(self, output: RequestOutput) -> tuple[str, dict[str, Any] | None]:
        """The text and the logprobs of a prompt, of whose first token there is none."""
        text, (first_id, *_) = output.prompt, output.prompt_token_ids
        if not isinstance(text, str):
            text = "" if self.tokenizer is None else self.tokenizer.decode(output.prompt_token_ids, False)
        if output.prompt_logprobs is None:
            return text, None
        first = f"token_id:{first_id}" if self.tokenizer is None else self.tokenizer.token_text(first_id)
        self.num_chars = len(first)
        told = {"tokens": [first], "token_logprobs": [None], "top_logprobs": [None], "text_offset": [0]}
        others = self._logprobs(output.prompt_logprobs[1:])
        return text, {name: told[name] + others[name] for name in told}

    def _logprobs(self, entries: list[Logprobs]) -> dict[str, Any]:
        own = [next(iter(entry.items())) for entry in entries]
        texts = [token_text(*item) for item in own]
        ends = list(accumulate(map(len, texts), initial=self.num_chars))
        self.num_chars = ends[-1]
        return {
            "tokens": texts,
            "token_logprobs": [finite(logprob) for _, logprob in own],
            # Texts may be equal, as those of single bytes are: the token's own is the last to be put down.
            "top_logprobs": [
                {token_text(*item): finite(item[1]) for item in reversed(entry.items())} for entry in entries
            ],
            "text_offset": ends[:-1],
        }


class ChatChoice:
    """A choice of a chat: reasoning, content and calls of tools."""

    whole_object, part_object = "chat.completion", "chat.completion.chunk"
    id_prefix = "chatcmpl-"

    def __init__(self, body: ChatRequest, index: int, output: RequestOutput, tokenizer: Tokenizer | None) -> None:
        """The choice `index` of an answer, to the rendered prompt of an output, which may have opened a <think>."""
        self.body = body
        self.index = index
        is_reasoning = (output.prompt or "").rstrip().endswith(THINK)
        if is_reasoning and (form := body.structure()) is not None:
            is_reasoning = END_OF_THINK in str(form)  # a form that does not speak of its end has no room for it
        self.parser = AnswerParser(body.offered_tools is not None, is_reasoning, bool(body.forced_tools))
        self.has_begun = False

    def part(self, sample: CompletionOutput, is_whole: bool) -> dict[str, Any]:
        """What a sample's output says."""
        reasoning, content, calls = self.parser.push(sample.text, sample.finish_reason is not None)
        if not self.body.parallel_tool_calls:
            calls = [call for call in calls if call["index"] == 0]
        message: dict[str, Any] = {}
        if not self.has_begun:
            message["role"], self.has_begun = "assistant", True
        if reasoning:
            message["reasoning_content"] = reasoning
        if content or "role" in message:
            message["content"] = content or (None if is_whole and (calls or reasoning) else "")
        if calls:
            message["tool_calls"] = calls
        logprobs = None
        if sample.logprobs is not None:
            logprobs = {"content": [self._logprob(entry) for entry in sample.logprobs]}
        choice = {"index": self.index, "message" if is_whole else "delta": message, "logprobs": logprobs}
        calls_tools = self.parser.num_calls and sample.finish_reason == "stop"
        reason = "tool_calls" if calls_tools else sample.finish_reason
        return choice | ending(sample, reason) | token_ids(sample, self.body)

    def _logprob(self, entry: Logprobs) -> dict[str, Any]:
        own_id = next(iter(entry))
        best = [item for item in entry.items() if item[1].rank <= (self.body.top_logprobs or 0)]
        best.sort(key=lambda item: item[1].rank)
        return spelled(own_id, entry[own_id]) | {"top_logprobs": [spelled(*item) for item in best]}


Choice = CompletionChoice | ChatChoice


class Answer:
    """What a request is answered, from the outputs of its prompts: all in one, or chunk by chunk."""

    def __init__(self, body: GenerationBody, model: str, tokenizer: Tokenizer | None = None) -> None:
        """The answer to a request, by a model of this name and tokenizer; nothing of it is there yet."""
        self.body = body
        self.tokenizer = tokenizer
        self.kind: type[Choice] = ChatChoice if isinstance(body, ChatRequest) else CompletionChoice
        self.head = {"id": f"{self.kind.id_prefix}{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self.choices: dict[int, dict[str, Any]] = {}  # whole ones, by index
        self.streamed: dict[int, Choice] = {}  # those of which a stream has told something, by index
        self.ended: set[int] = set()  # those of them of which it has told the end
        self._latest: dict[int, RequestOutput] = {}  # by prompt
        self._num_completion_tokens = 0

    def add(self, number: int, output: RequestOutput) -> None:
        """Takes in the finished output of the prompt `number`."""
        self._count(number, output)
        for sample in output.outputs:
            index = number * self.body.n + sample.index
            self.choices[index] = self._choice(index, output).part(sample, is_whole=True)

    def whole(self) -> dict[str, Any]:
        """The answer in one, once the outputs of all prompts are in."""
        choices = [choice for _, choice in sorted(self.choices.items())]
        return {**self.head, "object": self.kind.whole_object, "choices": choices, "usage": self.usage()}

    def chunks(self, number: int, output: RequestOutput) -> Iterator[dict[str, Any]]:
        """The parts of a stream that tell what an output of the prompt `number` has new."""
        self._count(number, output)
        for sample in output.outputs:
            index = number * self.body.n + sample.index
            if index in self.ended or not (sample.token_ids or sample.finish_reason is not None):
                continue  # only other samples have something new
            if index not in self.streamed:
                self.streamed[index] = self._choice(index, output)
            if sample.finish_reason is not None:
                self.ended.add(index)
            yield self._chunk([self.streamed[index].part(sample, is_whole=False)])

    def usage_chunk(self) -> dict[str, Any]:
        """The last part of a stream, if its usage is asked for."""
        return self._chunk([]) | {"usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        """The tokens of all outputs that are in."""
        num_prompt_tokens = sum(len(output.prompt_token_ids) for output in self._latest.values())
        num_cached_tokens = sum(output.num_cached_tokens for output in self._latest.values())
        return {
            "prompt_tokens": num_prompt_tokens,
            "completion_tokens": self._num_completion_tokens,
            "total_tokens": num_prompt_tokens + self._num_completion_tokens,
            "prompt_tokens_details": {"cached_tokens": num_cached_tokens},
        }

    def _choice(self, index: int, output: RequestOutput) -> Choice:
        return self.kind(self.body, index, output, self.tokenizer)

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk = {**self.head, "object": self.kind.part_object, "choices": choices}
        return chunk | {"usage": None} if self.body.includes_usage else chunk

    def _count(self, number: int, output: RequestOutput) -> None:
        self._latest[number] = output
        for sample in output.outputs:
            self._num_completion_tokens += len(sample.token_ids)


def ending(sample: CompletionOutput, reason: str | None) -> dict[str, Any]:
    """How a choice ends, if it does."""
    return {"finish_reason": reason, "stop_reason": sample.stop_reason}


def token_ids(sample: CompletionOutput, body: GenerationBody) -> dict[str, Any]:
    """The ids of a sample's tokens, if they are asked for."""
    return {"token_ids": sample.token_ids} if body.return_token_ids else {}


def token_text(token_id: int, logprob: Logprob) -> str:
    """The text of a token; a name if the engine has no tokenizer."""
    return f"token_id:{token_id}" if logprob.decoded_token is None else logprob.decoded_token


def finite(logprob: Logprob) -> float:
    """The number, as JSON can hold it."""
    return max(logprob.logprob, LOWEST_LOGPROB)


def spelled(token_id: int, logprob: Logprob) -> dict[str, Any]:
    """A token's logprob as chats have it."""
    text = token_text(token_id, logprob)
    return {"token": text, "logprob": finite(logprob), "bytes": list(text.encode())}
