"""Batches on many machines, by Ray Data: what its `map_batches` makes an actor of. See examples/ray_batch.py.

Ray itself is not imported: it gives batches of rows to a callable, and restarts and repeats what was lost with a
machine. Nothing here knows how rows are read or written.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from nanovllm.batch.iterate import complete
from nanovllm.chat.prompts import render_conversations
from nanovllm.inputs import Prompt
from nanovllm.inputs.forms import LISTS
from nanovllm.llm import LLM
from nanovllm.requests.admission import CheckedRequest
from nanovllm.sampling_params import SamplingParams

Rows = dict[str, np.ndarray]  # columns of one length


class Predictor:
    """Completes batches of rows by an engine of its own, which is kept from one batch to the next.

    rows.map_batches(
        Predictor,
        fn_constructor_kwargs={"model": "Qwen/Qwen3-0.6B", "sampling_params": SamplingParams(max_tokens=100)},
        compute=ray.data.ActorPoolStrategy(size=8),  # engines, on any number of machines
        num_gpus=1,  # of each engine, as many as it has ranks
        batch_size=1024,  # rows that an engine computes at a time
    )
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        sampling_params: SamplingParams | None = None,
        column: str = "prompt",
        **options: Any,
    ) -> None:
        """Starts an engine; Ray has set CUDA_VISIBLE_DEVICES to the GPUs of this actor.

        Args:
            model: as `LLM` takes it; other machines must find it under that name too.
            sampling_params: of all rows; None: the model's defaults.
            column: what has the prompts: strings, token ids, or conversations, that is lists of messages.
            options: further ones of `LLM`.

        Raises:
            TypeError, ValueError: an option or a parameter does not do.
        """
        self.column = column
        self.llm = LLM(model, **options)
        self.params = self.llm.get_default_sampling_params() if sampling_params is None else sampling_params
        checked = self.llm.intake.check_one([0], self.params)
        if checked.params.n > 1:
            raise ValueError(f"a row has one text, got n={checked.params.n}; repeat the rows for several")

    def __call__(self, rows: Rows) -> Rows:
        """The rows with further columns.

        These are text, finish_reason, num_prompt_tokens, num_generated_tokens, and error: why a row has no text, or
        "". Its finish_reason is "error" then, and the other rows go on.

        Raises:
            KeyError: there is no such column as was named.
            RuntimeError: the engine has failed.
        """
        prompts = rows[self.column]
        texts, reasons, errors = ([""] * len(prompts) for _ in range(3))
        num_prompt_tokens, num_generated_tokens = np.zeros((2, len(prompts)), dtype=np.int64)
        for index, result in complete(self.llm, self._requests(prompts, errors)):
            texts[index] = result.text
            reasons[index] = result.finish_reason
            errors[index] = result.get("error", "")
            num_prompt_tokens[index] = len(result.prompt_token_ids)
            num_generated_tokens[index] = len(result.token_ids)
        reasons = ["error" if error else reason for reason, error in zip(reasons, errors, strict=True)]
        return {
            **rows,
            "text": np.array(texts, dtype=object),
            "finish_reason": np.array(reasons, dtype=object),
            "num_prompt_tokens": num_prompt_tokens,
            "num_generated_tokens": num_generated_tokens,
            "error": np.array(errors, dtype=object),
        }

    def _requests(self, prompts: np.ndarray, errors: list[str]) -> Iterator[tuple[int, CheckedRequest]]:
        """The requests of the good rows, by their index; what is wrong with the others goes into `errors`."""
        for index, value in enumerate(prompts):
            try:
                request = self.llm.intake.check_one(self._prompt(value), self.params)
            except (TypeError, ValueError) as error:
                errors[index] = str(error)
                continue
            yield index, request

    def _prompt(self, value: Any) -> Prompt:
        """A row's prompt, rendered if it is a conversation."""
        if not isinstance(value, LISTS) or len(value) == 0 or not isinstance(value[0], dict):
            return value
        # A column has one type: what some messages lack is None there.
        messages = [{name: part for name, part in message.items() if part is not None} for message in value]
        (prompt,) = render_conversations(self.llm.chat_template, self.llm.tokenizer, messages)
        return prompt
