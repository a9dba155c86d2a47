"""One text, piece by piece, in the thread that reads it. Nothing here knows how a step is computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from nanovllm.chat.prompts import is_conversation, render_conversations
from nanovllm.outputs import RequestError, RequestOutput
from nanovllm.requests.admission import CheckedRequest
from nanovllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from nanovllm.chat.template import Message
    from nanovllm.inputs import Prompt
    from nanovllm.llm import LLM


def stream(
    llm: LLM, prompt: Prompt | Sequence[Message], sampling_params: SamplingParams | None, **chat_options: Any
) -> Iterator[str]:
    """`LLM.stream`, whose arguments and results these are; what is wrong with them is raised at once."""
    if llm.tokenizer is None:
        raise ValueError("stream yields text, and the model has no tokenizer")
    if is_conversation(prompt):
        (prompt,) = render_conversations(llm.chat_template, llm.tokenizer, prompt, **chat_options)
    elif chat_options:
        raise TypeError(f"{', '.join(chat_options)} must come with a conversation, got the prompt {prompt!r:.100}")
    checked = llm.intake.check_one(prompt, sampling_params)
    if checked.params.n > 1:
        raise ValueError(f"stream yields one text, got n={checked.params.n}; `generate` returns several")
    if not checked.params.detokenize:
        raise ValueError("stream yields text, and detokenize=False asks for none")
    return _pieces(llm, checked)


def _pieces(llm: LLM, checked: CheckedRequest) -> Iterator[str]:
    """The pieces of a request's text; it is queued when the first one is asked for.

    Whoever wants the next piece drives the engine, unless other threads' steps have brought one.
    """
    results: dict[int, RequestOutput] = {}
    ids = []
    try:
        with llm._turn():
            ids = [llm.num_seqs]
            request = llm.intake.make(checked, results, is_streamed=True)
            llm.requests.add(request)
        (seq,) = request.seqs
        while not results:
            with llm._turn():
                piece = seq.detokenizer.take(seq.is_finished)
                if not piece and not results:  # other threads' steps have brought nothing
                    llm._advance()
                    piece = seq.detokenizer.take(seq.is_finished)
            if piece:
                yield piece
        last_piece = seq.detokenizer.take(True)
        if last_piece:
            yield last_piece
        if seq.finish_reason == "error":
            raise RequestError(results[seq.seq_id]["error"], list(results.values()))
    finally:
        llm._drop(ids)
