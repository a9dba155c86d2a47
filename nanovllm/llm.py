"""The facade that users import."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from nanovllm.engine.llm_engine import LLMEngine, Params, Prompt
from nanovllm.sampling_params import SamplingParams

Message = dict[str, Any]


class LLM(LLMEngine):
    """Offline inference with one model.

    `LLM(model, **options)` takes a Hugging Face folder or hub name and the options of `nanovllm.config.Config`:

        with LLM("Qwen/Qwen3-0.6B") as llm:
            print(llm.generate("introduce yourself", SamplingParams(max_tokens=100))[0]["text"])
    """

    @cached_property
    def chat_tokenizer(self) -> Any:
        """transformers' tokenizer of the model, whose chat template `chat` renders with; None if there is no template.

        Loaded when it is first asked for: importing transformers takes seconds.
        """
        if self.tokenizer is None:
            return None
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.config.model)
        return tokenizer if tokenizer.chat_template else None

    def chat(self, messages: Sequence[Message] | Sequence[Sequence[Message]], sampling_params: Params = None,
            use_tqdm: bool = True) -> list[dict[str, Any]]:  # fmt: skip
        """Answers a conversation, or each of a list of them, rendered by the tokenizer's chat template.

        A conversation is a list of messages such as {"role": "user", "content": "Hello"}. Returns what `generate`
        returns; raises what it raises, and ValueError where the model has no chat template.
        """
        self._check_alive()
        if self.chat_tokenizer is None:
            raise ValueError("chat needs a tokenizer with a chat template, the model has none")
        conversations = [messages] if messages and isinstance(messages[0], dict) else messages
        render = self.chat_tokenizer.apply_chat_template
        texts = [render(conversation, tokenize=False, add_generation_prompt=True) for conversation in conversations]
        prompts = [self.tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
        return self.generate(prompts, sampling_params, use_tqdm)

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[str]:
        """Yields the text of one request piece by piece, whole characters only; the pieces make up `generate`'s text.

        Raises:
            TypeError, ValueError: a bad prompt or parameter, at once.
        """
        self._check_alive()
        if self.tokenizer is None:
            raise ValueError("stream yields text, and the model has no tokenizer")
        return self._stream(*self._checked(prompt, sampling_params or SamplingParams()))

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _stream(self, token_ids: list[int], params: SamplingParams) -> Iterator[str]:
        request_id = self.num_requests
        try:
            seq = self._add(token_ids, params, is_streamed=True)
            while not seq.is_finished:
                self._check_alive()
                self._advance()
                if piece := seq.detokenizer.take(seq.is_finished):
                    yield piece
            if piece := seq.detokenizer.take(True):  # another call has finished it meanwhile
                yield piece
        finally:
            self._drop([request_id])
