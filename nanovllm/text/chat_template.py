"""Conversations to prompts, through the model's chat template. Rendering is left to transformers, imported for it."""

from collections.abc import Sequence
from typing import Any

Message = dict[str, Any]
PROBE = "nanovllmprobe"


class ChatTemplate:
    """The chat template of a model folder.

    Attributes:
        tokenizer: transformers' tokenizer of the folder.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._takes_parts: dict[str, bool] = {}  # by role

    @classmethod
    def from_folder(cls, folder: str) -> "ChatTemplate | None":
        """The template of a folder, None if it has none."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)
        return cls(tokenizer) if tokenizer.chat_template else None

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt that asks for the answer to a conversation.

        A message's content is a string, or a list of parts {"type": "text", "text": ...} as OpenAI's API has them.
        Parts are handed on to a template that loops over them, and joined by line breaks for one that does not.

        Raises:
            TypeError, ValueError: no messages, a part that is no text, or what the template refuses, naming it.
        """
        return self._apply([self._spell(message) for message in check_messages(messages)])

    def _spell(self, message: Message) -> Message:
        """The message as the template expects it."""
        content = message.get("content")
        if not isinstance(content, list) or self.takes_parts(message["role"]):
            return message
        return message | {"content": "\n".join(part["text"] for part in content)}

    def takes_parts(self, role: str) -> bool:
        """Whether the template loops over the parts of a content, found out by having it render one."""
        if role not in self._takes_parts:
            probed = {"role": role, "content": [{"type": "text", "text": PROBE}]}
            question = {"role": "user", "content": "?"}
            conversation = {"user": [probed], "system": [probed, question], "developer": [probed, question]}
            try:
                text = self._apply(conversation.get(role, [question, probed]))
            except ValueError:
                text = ""
            # A template that expects a string prints the list as Python or JSON would, or leaves it out.
            is_printed = any(f"{quote}type{quote}" in text for quote in ("'", '"'))
            self._takes_parts[role] = PROBE in text and not is_printed
        return self._takes_parts[role]

    def _apply(self, conversation: list[Message]) -> str:
        try:
            return self.tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template may fail in any way
            raise ValueError(f"the chat template cannot render messages={conversation!r:.500}: {error}") from error


def check_messages(messages: Sequence[Message]) -> Sequence[Message]:
    """The messages of one conversation.

    Raises:
        TypeError: something is of another type.
        ValueError: no messages, or a part of a content that is no text.
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
    return messages
