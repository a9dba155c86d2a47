"""The facade that users import: an engine with chats, streams of text and a `with` block.

Nothing here knows how requests are computed.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NoReturn

from tqdm.auto import tqdm

from nanovllm.batch.iterate import generate_iter
from nanovllm.beam_search import BeamSearchOutput
from nanovllm.beam_search.params import BeamSearchParams
from nanovllm.beam_search.search import beam_search
from nanovllm.chat.prompts import render_conversations
from nanovllm.chat.stream import stream
from nanovllm.chat.template import ChatTemplate, ContentFormat, Message
from nanovllm.compat.refused_arguments import refuse
from nanovllm.compat.refused_methods import refused_method
from nanovllm.config import Config
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.inputs import Prompt
from nanovllm.options.signature import takes_options_of
from nanovllm.outputs import RequestOutput
from nanovllm.requests.admission import Params
from nanovllm.sampling_params import SamplingParams


class LLM(LLMEngine):
    """Offline inference with one model.

        with LLM("Qwen/Qwen3-0.6B") as llm:
            print(llm.generate("introduce yourself", SamplingParams(max_tokens=100))[0]["text"])

    Any number of threads may use it at once, see LLMEngine.
    """

    @takes_options_of(Config)
    def __init__(self, model: str | os.PathLike[str], **options: Any) -> None:
        """Starts an engine for a Hugging Face folder or hub name, or a GGUF file.

        `nanovllm.config.Config` says what the options are.

        Options of vLLM that have another name there, or that ask for nothing else than what is here, may be given too.

        Raises:
            TypeError, ValueError: an unknown option, or an option, the checkpoint or the memory does not do.
            RuntimeError: a rank failed, or the GPU's memory did not suffice.
        """
        super().__init__(model, **options)

    @property
    def llm_engine(self) -> "LLM":
        """The engine, as vLLM's and nano-vllm's scripts ask for it: the LLM is one itself."""
        return self

    @property
    def chat_template(self) -> ChatTemplate:
        """What `chat` renders with. Made when it is first asked for: importing transformers takes seconds.

        Raises:
            ValueError: the model has no tokenizer.
        """
        with self._turn():
            return self._chat_template

    @cached_property
    def _chat_template(self) -> ChatTemplate:
        if self.tokenizer is None:
            raise ValueError("the model has no tokenizer: there are no chats, and prompts must be token ids")
        return ChatTemplate.from_folder(self.config.tokenizer)

    def get_tokenizer(self) -> Any:
        """transformers' tokenizer of the model, which is imported for it; the engine itself uses `tokenizer`.

        Raises:
            ValueError: the model has no tokenizer.
        """
        return self.chat_template.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """A copy of the parameters that are used where none are given."""
        return self.default_sampling_params.clone()

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: Params = None,
        use_tqdm: bool | Callable[..., tqdm] = True,
        lora_request: None = None,
        chat_template: str | None = None,
        chat_template_content_format: ContentFormat = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[dict[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: None = None,
    ) -> list[RequestOutput]:
        """Answers a conversation, or each of a list of them, rendered by a chat template.

        A conversation is a list of messages such as {"role": "user", "content": "Hello"}. A content may also be a list
        of parts {"type": "text", "text": "Hello"}.

        Args:
            messages: the conversation, or a list of them.
            sampling_params, use_tqdm: as for `generate`.
            lora_request, mm_processor_kwargs: not supported.
            chat_template: a Jinja template in place of the model's.
            chat_template_content_format: what the template takes as a content, "string" or a list of parts ("openai");
                "auto" finds it out.
            add_generation_prompt: ask for an answer; without, the model goes on behind the last message's end.
            continue_final_message: let the model go on with the last message; add_generation_prompt must be False.
            tools: descriptions of functions, for the template to tell the model of.
            chat_template_kwargs: further variables of the template, such as {"enable_thinking": False}.

        Returns:
            What `generate` returns.

        Raises:
            TypeError, ValueError: what `generate` raises; there is no chat template, the template refuses the
                messages, or a part is no text.
            RequestError, RuntimeError: as for `generate`.
        """
        refuse({"lora_request": lora_request, "mm_processor_kwargs": mm_processor_kwargs})
        self._check_alive()
        prompts = render_conversations(
            self.chat_template,
            self.tokenizer,
            messages,
            chat_template=chat_template,
            chat_template_content_format=chat_template_content_format,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            chat_template_kwargs=chat_template_kwargs,
        )
        return self.generate(prompts, sampling_params, use_tqdm)

    def generate_iter(
        self, prompts: Iterable[Prompt], sampling_params: SamplingParams | Iterable[SamplingParams] | None = None
    ) -> Iterator[tuple[int, RequestOutput]]:
        """Completes prompts from any iterator, also of millions; yields (index, result) as they finish.

        Prompts are drawn as the engine needs them, at most 2 * max_num_seqs ahead of the results, and nothing is kept
        of those that were yielded. Closing the generator drops what is unfinished.

        Args:
            prompts: an iterable of what `generate` takes as a prompt.
            sampling_params: for all prompts, or an iterable with one for each; None: the model's defaults.

        Returns:
            The results that `generate` would give; one of a request that failed says why under `error`.

        Raises:
            TypeError, ValueError: arguments of another type, at once. A bad prompt or parameter, named by its index,
                or what the iterator raises: once all results of the prompts before it have been yielded.
            RuntimeError: the engine has failed or is closed.
        """
        self._check_alive()
        return generate_iter(self, prompts, sampling_params)

    def stream(
        self, prompt: Prompt | Sequence[Message], sampling_params: SamplingParams | None = None, **chat_options: Any
    ) -> Iterator[str]:
        """Yields the text of one request piece by piece, whole characters only; the pieces make up `generate`'s text.

        Args:
            prompt: as for `generate`; or a conversation, whose answer is yielded.
            sampling_params: the defaults if None.
            chat_options: how a conversation is rendered, as for `chat`: chat_template, tools and so on.

        Raises:
            TypeError, ValueError: a bad prompt or parameter, at once.
            RequestError: the request failed; what there is of it has been yielded.
            RuntimeError: the engine has failed or is closed.
        """
        self._check_alive()
        return stream(self, prompt, sampling_params, **chat_options)

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: BeamSearchParams,
        lora_request: None = None,
        use_tqdm: bool = False,
        concurrency_limit: int | None = None,
    ) -> list[BeamSearchOutput]:
        """The continuations of each prompt that a beam search finds most probable.

        `beam_search/search.py` says what the arguments are, and what is raised. `lora_request` is not supported;
        `concurrency_limit` changes nothing, as the engine bounds what runs at once.
        """
        refuse({"lora_request": lora_request})
        return beam_search(self, prompts, params, use_tqdm)

    def __getattr__(self, name: str) -> Callable[..., NoReturn]:
        """vLLM's methods that are not here say why when they are called."""
        return refused_method(self, name)

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
