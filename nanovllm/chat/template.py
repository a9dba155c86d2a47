"""Conversations to prompts, through a chat template. Rendering is left to transformers, imported for it."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from nanovllm.checkpoint.tokenizer import pretrained_tokenizer

Message = dict[str, Any]
ContentFormat = Literal["auto", "string", "openai"]
PROBE = "nanovllmprobe"
MOST_ROLES = 16  # of a conversation: what a template makes of each is found out
NUM_KEPT = 64  # most answers to that which are kept, as roles may be any strings


class ChatTemplate:
    """The chat template of a model folder, or another in its place.

    Attributes:
        tokenizer: transformers' tokenizer of the folder.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._shown: dict[tuple[str, str, bool], bool] = {}  # what `_shows` has found out

    @classmethod
    def from_folder(cls, folder: str) -> "ChatTemplate":
        """The template of a folder, or a GGUF file, that has a tokenizer."""
        return cls(pretrained_tokenizer(folder))

    def render(
        self,
        messages: Sequence[Message],
        chat_template: str | None = None,
        chat_template_content_format: ContentFormat = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt of a conversation: what transformers' `apply_chat_template` makes of it.

        A message's content is a string, or a list of parts {"type": "text", "text": ...} as OpenAI's API has them. The
        arguments of an assistant's tool calls may be JSON, as they are there: templates get the objects. A developer's
        message is one of the system's for templates that would leave it out.

        Args:
            messages: the conversation.
            chat_template: a template's text, or the name of one where the model has several; the model's if None.
            chat_template_content_format: "string" joins parts by line breaks, "openai" makes a part of a string;
                "auto" leaves a content as it is, unless the template takes it in the other form only.
            add_generation_prompt: end with what asks for an answer.
            continue_final_message: end within the last message, for the model to go on with it.
            tools: functions that the model may call, as JSON schemas or as what transformers makes them of.
            chat_template_kwargs: further variables of the template, such as {"enable_thinking": False}.

        Raises:
            TypeError, ValueError: a bad argument, no messages, a part that is no text, no template, or what the
                template refuses, naming it.
        """
        if chat_template_content_format not in get_args(ContentFormat):
            choices = ", ".join(map(repr, get_args(ContentFormat)))
            raise ValueError(
                f"chat_template_content_format must be one of {choices}, got {chat_template_content_format!r}"
            )
        if add_generation_prompt and continue_final_message:
            raise ValueError("continue_final_message=True needs add_generation_prompt=False, got True for both")
        if tools is not None and not isinstance(tools, (list, tuple)):
            raise TypeError(f"tools must be a list, got {tools!r:.200}")
        if chat_template_kwargs is not None and not isinstance(chat_template_kwargs, dict):
            raise TypeError(f"chat_template_kwargs must be a dict, got {chat_template_kwargs!r:.200}")
        source = self._source(chat_template, tools)
        conversation = [
            self._spell(source, parse_arguments(message), chat_template_content_format)
            for message in check_messages(messages)
        ]
        return self._apply(
            source,
            conversation,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            **chat_template_kwargs or {},
        )

    def takes_parts(self, message: Message, source: str) -> bool:
        """Whether a template loops over the parts of such a message's content; if it takes a string too, as it is."""
        shows_parts = self._shows(source, message["role"], True)
        return shows_parts and (
            isinstance(message["content"], list) or not self._shows(source, message["role"], False)
        )

    def _source(self, chat_template: str | None, tools: Sequence[Any] | None) -> str:
        """The text of the template to use."""
        own = self.tokenizer.chat_template  # of several: a dict by name
        if chat_template is None and not own:
            raise ValueError("the model has no chat template: pass one as chat_template")
        if chat_template is not None and not isinstance(chat_template, str):
            raise TypeError(f"chat_template must be a string, got {chat_template!r:.200}")
        if chat_template is not None and "{" not in chat_template and chat_template not in (own or ()):
            raise ValueError(
                f"chat_template must be a Jinja template, not the name of a file, got {chat_template!r:.200}"
            )
        return self.tokenizer.get_chat_template(chat_template, tools)

    def _spell(self, source: str, message: Message, content_format: ContentFormat) -> Message:
        """The message as the template expects it."""
        if message["role"] == "developer" and not any(
            self._shows(source, "developer", form) for form in (True, False)
        ):
            message = message | {"role": "system"}
        content = message.get("content")
        if content is None:
            return message
        in_parts = self.takes_parts(message, source) if content_format == "auto" else content_format == "openai"
        if in_parts and isinstance(content, str):
            return message | {"content": [{"type": "text", "text": content}]}
        if not in_parts and isinstance(content, list):
            return message | {"content": "\n".join(part["text"] for part in content)}
        return message

    def _shows(self, source: str, role: str, in_parts: bool) -> bool:
        """Whether the template shows the text of such a role's content, found out by having it render one."""
        key = (source, role, in_parts)
        shown = self._shown.get(key)
        if shown is None:
            if len(self._shown) >= NUM_KEPT:
                self._shown.clear()
            probed = {"role": role, "content": [{"type": "text", "text": PROBE}] if in_parts else PROBE}
            question = {"role": "user", "content": "?"}
            conversation = {"user": [probed], "system": [probed, question], "developer": [probed, question]}
            try:
                text = self._apply(source, conversation.get(role, [question, probed]), add_generation_prompt=True)
            except ValueError:
                text = ""
            # A template that expects a string prints the list as Python or JSON would, or leaves it out.
            is_printed = in_parts and any(f"{quote}type{quote}" in text for quote in ("'", '"'))
            shown = self._shown[key] = PROBE in text and not is_printed
        return shown

    def _apply(self, source: str, conversation: list[Message], /, **options: Any) -> str:
        try:
            return self.tokenizer.apply_chat_template(conversation, chat_template=source, tokenize=False, **options)
        except Exception as error:  # a template may fail in any way
            raise ValueError(f"the chat template cannot render messages={conversation!r:.500}: {error}") from error


def check_messages(messages: Sequence[Message]) -> Sequence[Message]:
    """The messages of one conversation.

    Raises:
        TypeError: something is of another type.
        ValueError: no messages, a part of a content that is no text, or too many roles.
    """
    if not isinstance(messages, (list, tuple)):
        raise TypeError(f"a conversation must be a list of messages, got {messages!r}")
    if not messages:
        raise ValueError("a conversation must have messages, got none")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise TypeError(f"a message must be a dict with a role, got {message!r}")
        content = message.get("content")
        if content is not None and not isinstance(content, (str, list)):
            raise TypeError(f"a message's content must be a string or a list of parts, got {content!r}")
        for part in content if isinstance(content, list) else ():
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise ValueError(
                    f"the model takes text only: a part must be of type 'text' and have one, got {part!r}"
                )
    num_roles = len({message["role"] for message in messages})
    if num_roles > MOST_ROLES:
        raise ValueError(f"a conversation must have at most {MOST_ROLES} roles, got {num_roles}")
    return messages


def parse_arguments(message: Message) -> Message:
    """The message with the arguments of its tool calls as objects, where they are JSON or missing.

    Raises:
        ValueError: arguments that are not JSON.
    """
    if not isinstance(message.get("tool_calls"), (list, tuple)):
        return message
    calls = []
    for call in message["tool_calls"]:
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict):
            arguments = function.get("arguments") or {}
            if isinstance(arguments, str):
                try:
                    arguments = json.loads(arguments)
                except ValueError as error:
                    raise ValueError(
                        f"a tool call's arguments must be JSON, got {arguments!r:.200}: {error}"
                    ) from error
            call = call | {"function": function | {"arguments": arguments}}
        calls.append(call)
    return message | {"tool_calls": calls}
