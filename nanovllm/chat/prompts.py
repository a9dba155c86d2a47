"""Conversations to the prompts of an engine. How one is rendered is for `template.py` to say."""

from collections.abc import Sequence
from typing import Any

from nanovllm.chat.template import ChatTemplate, Message
from nanovllm.inputs import TokensPrompt
from nanovllm.text.tokenizer import Tokenizer


def is_conversation(messages: object) -> bool:
    """Whether something is one list of messages, not a list of such lists or a prompt; the messages may be bad."""
    return isinstance(messages, (list, tuple)) and len(messages) > 0 and isinstance(messages[0], dict)


def render_conversations(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    messages: Sequence[Message] | Sequence[Sequence[Message]],
    **options: Any,
) -> list[TokensPrompt]:
    """The prompts of one conversation or a list of them.

    Args:
        template: what they are rendered by.
        tokenizer: the engine's own; it adds no special tokens, as a rendered text has its own.
        options: those of `ChatTemplate.render`.

    Raises:
        TypeError, ValueError: what `ChatTemplate.render` raises, or `messages` are no list.
    """
    if not isinstance(messages, (list, tuple)):
        raise TypeError(f"messages must be a conversation or a list of them, got {messages!r}")
    conversations = [messages] if is_conversation(messages) else messages
    texts = [template.render(conversation, **options) for conversation in conversations]
    return [{"prompt": text, "prompt_token_ids": tokenizer.encode(text, add_special_tokens=False)} for text in texts]
