"""The facade that users import: an engine with chats, streams of text and a `with` block.

Nothing here knows how requests are computed.
"""

import os
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from nanovllm.config import Dtype
from nanovllm.engine.admission import Params, Prompt, check_request
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.outputs import RequestError, Result
from nanovllm.sampling_params import SamplingParams
from nanovllm.text.chat_template import ChatTemplate, Message


class LLM(LLMEngine):
    """Offline inference with one model.

        with LLM("Qwen/Qwen3-0.6B") as llm:
            print(llm.generate("introduce yourself", SamplingParams(max_tokens=100))[0]["text"])

    Any number of threads may use it at once, see LLMEngine.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        max_num_batched_tokens: int = 16384,
        max_num_seqs: int = 512,
        max_model_len: int = 4096,
        gpu_memory_utilization: float = 0.9,
        tensor_parallel_size: int = 1,
        enforce_eager: bool = False,
        kvcache_block_size: int = 256,
        num_kvcache_blocks: int = -1,
        dtype: Dtype = "auto",
        device: Literal["auto", "cuda", "cpu"] = "auto",
        attention_backend: Literal["auto", "flash_attn", "triton", "torch"] = "auto",
        sampler_backend: Literal["auto", "triton", "torch"] = "auto",
        enable_prefix_caching: bool = True,
        async_scheduling: bool = True,
        load_format: Literal["auto", "dummy"] = "auto",
        seed: int = 0,
        **unknown: Any,
    ) -> None:
        """Starts an engine for a Hugging Face folder or hub name; `nanovllm.config.Config` says what the options are.

        Raises:
            TypeError, ValueError: an unknown option, or an option, the checkpoint or the memory does not do.
            RuntimeError: a rank failed, or the GPU's memory did not suffice.
        """
        arguments = locals()  # nothing else yet, so that the keywords need not be listed again
        options = {name: arguments[name] for name in LLM.__init__.__kwdefaults__}
        super().__init__(model, **options, **unknown)
        self._chat_template: ChatTemplate | None = None
        self._has_looked_for_template = False

    @property
    def chat_template(self) -> ChatTemplate | None:
        """The template that `chat` renders with, None if the model has none.

        Loaded when it is first asked for: importing transformers takes seconds.
        """
        with self._turn():
            if not self._has_looked_for_template and self.tokenizer is not None:
                self._chat_template = ChatTemplate.from_folder(self.config.model)
            self._has_looked_for_template = True
            return self._chat_template

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: Params = None,
        use_tqdm: bool = True,
    ) -> list[Result]:
        """Answers a conversation, or each of a list of them, rendered by the tokenizer's chat template.

        A conversation is a list of messages such as {"role": "user", "content": "Hello"}. A content may also be a list
        of parts {"type": "text", "text": "Hello"}. Returns what `generate` returns; raises what it raises, and
        ValueError where the model has no chat template, the template refuses the messages, or a part is no text.
        """
        template = self.chat_template
        if template is None:
            raise ValueError("chat needs a tokenizer with a chat template, the model has none")
        if not isinstance(messages, (list, tuple)):
            raise TypeError(f"messages must be a conversation or a list of them, got {messages!r}")
        conversations = [messages] if messages and isinstance(messages[0], dict) else messages
        texts = [template.render(conversation) for conversation in conversations]
        prompts = [self.tokenizer.encode(text, add_special_tokens=False) for text in texts]
        return self.generate(prompts, sampling_params, use_tqdm)

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[str]:
        """Yields the text of one request piece by piece, whole characters only; the pieces make up `generate`'s text.

        Raises:
            TypeError, ValueError: a bad prompt or parameter, at once.
            RequestError: the request failed; what there is of it has been yielded.
            RuntimeError: the engine has failed or is closed.
        """
        self._check_alive()
        if self.tokenizer is None:
            raise ValueError("stream yields text, and the model has no tokenizer")
        token_ids, params = check_request(prompt, sampling_params or SamplingParams(), self.config, self.tokenizer)
        return self._stream(token_ids, params)

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _stream(self, token_ids: list[int], params: SamplingParams) -> Iterator[str]:
        """`stream` of a request that was checked; a generator of its own, which checks nothing before its first piece.

        Whoever wants the next piece drives the engine, unless other threads' steps have brought one.
        """
        results: dict[int, Result] = {}
        ids = []
        try:
            with self._turn():
                ids = [self.num_requests]
                seq = self._add(token_ids, params, results, is_streamed=True)
            while not results:
                with self._turn(second_breaks=True):
                    piece = seq.detokenizer.take(seq.is_finished)
                    if not piece and not results:  # other threads' steps have brought nothing
                        self._advance()
                        piece = seq.detokenizer.take(seq.is_finished)
                if piece:
                    yield piece
            last_piece = seq.detokenizer.take(True)
            if last_piece:
                yield last_piece
            if seq.finish_reason == "error":
                raise RequestError(results[seq.seq_id]["error"], list(results.values()))
        finally:
            self._drop(ids)
