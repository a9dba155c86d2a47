"""A model as requests see it: by a name, with a chat template, and with no paths in what is said of mistakes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import ValidationError

from nanovllm.chat.prompts import render_conversations
from nanovllm.inputs import Prompt
from nanovllm.openai_api.errors import Refused, from_validation
from nanovllm.openai_api.protocol import ChatRequest, CompletionRequest, TokenizeRequest

if TYPE_CHECKING:
    from nanovllm.async_engine.async_llm import AsyncLLM
    from nanovllm.llm import LLM


class ServedModel:
    """The model of an engine, whose options and tokenizer are all that is used of it."""

    def __init__(self, llm: LLM | AsyncLLM, name: str) -> None:
        """Under the name that requests call it."""
        self.name = name
        self.config = llm.config
        self.tokenizer = llm.tokenizer
        self.template = llm.chat_template if llm.tokenizer is not None else None

    def check_name(self, name: str | None) -> None:
        """Raises Refused if a request is for another model."""
        if name not in (None, self.name):
            raise Refused(404, f"the model {name!r} does not exist, only {self.name!r}", "model", "model_not_found")

    def prompts(self, body: CompletionRequest | ChatRequest) -> list[Prompt]:
        """The prompts of a request. Raises TypeError or ValueError if there are none."""
        return [self.render(body)] if isinstance(body, ChatRequest) else body.prompts()

    def render(self, body: ChatRequest | TokenizeRequest) -> Prompt:
        """The prompt of a conversation. Raises TypeError or ValueError if there is none."""
        if self.template is None:
            raise ValueError("the model has no tokenizer: there are no chats, and prompts must be token ids")
        # Clients send back answers with nulls for calls; some templates ask only whether there is such a field.
        messages = [
            {name: value for name, value in message.items() if value is not None or name == "content"}
            for message in body.messages
        ]
        (prompt,) = render_conversations(self.template, self.tokenizer, [messages], **body.template_options())
        return prompt

    def refusal(self, error: Exception) -> Refused:
        """What is told of a mistake in a request, by the error that it has led to."""
        if isinstance(error, Refused):
            return error
        if isinstance(error, RecursionError):
            return Refused(400, "something in the body is nested too deeply")
        if isinstance(error, ValidationError):
            return from_validation(error.errors(include_url=False, include_context=False)[0])
        return Refused(400, self._without_paths(str(error)))

    def failure(self, message: str, body: CompletionRequest | ChatRequest) -> Refused:
        """What is told of a request that failed while it ran, by the `error` of its output."""
        # A form that does not compile is the request's mistake, though it is found only then.
        return Refused(500 if body.structure() is None else 400, self._without_paths(message))

    def _without_paths(self, message: str) -> str:
        """A message of the engine's without the folders that it was started with."""
        config = self.config
        for path in filter(None, (config.model, config.tokenizer, config.hf_config_path)):
            message = message.replace(str(path), self.name)
        return message
