"""What one request asks for: how its tokens are drawn, what is told of them and when it ends.

Every option is checked here for what it can mean by itself and beside the others. Nothing here knows the model, the
tokenizer or the prompt: whether an id is in the vocabulary, a text can be tokenised or a schema compiled is for others
to say.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from nanovllm.beam_search.params import BeamSearchParams
from nanovllm.compat.refused_arguments import refuse_params
from nanovllm.options.checks import LARGEST_FLOAT32, Limits, Options, check_fields
from nanovllm.sampling.checks import check_lists
from nanovllm.structured.params import GuidedDecodingParams, StructuredOutputsParams, checked_structure

__all__ = [
    "BeamSearchParams",
    "GuidedDecodingParams",
    "RequestOutputKind",
    "SamplingParams",
    "StructuredOutputsParams",
]

SMALLEST_FLOAT32 = 2.0**-126  # that is not denormal: one can divide by it
LIMITS: Limits = {  # lowest, highest: what the device's numbers hold
    "temperature": (0, LARGEST_FLOAT32),
    "top_k": (-1, 2**63 - 1),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "max_tokens": (1,),
    "seed": (-(2**63), 2**64 - 1),
    "n": (1,),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "repetition_penalty": (SMALLEST_FLOAT32, LARGEST_FLOAT32),
    "min_tokens": (0,),
    "logprobs": (-1,),
    "prompt_logprobs": (-1,),
    "truncate_prompt_tokens": (-1,),
}


class RequestOutputKind(Enum):
    """What the results of a request hold that is reported while it runs: all so far, what is new, or only the end."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@dataclass(repr=False, slots=True)
class SamplingParams(Options):
    """Sampling options of one request. They may be assigned to, and are checked again when used.

    Attributes:
        temperature: divides the logits; 0 is greedy.
        top_k: keep the k most likely tokens; -1 or 0 keeps all, as does a k of the vocabulary's size or more.
        top_p: keep the smallest set of most likely tokens whose probabilities sum to top_p (nucleus sampling,
            arXiv 1904.09751); in (0, 1].
        min_p: keep tokens at least min_p times as likely as the most likely one (arXiv 2407.01082); in [0, 1].
        max_tokens: most tokens to generate; None goes as far as the model does.
        ignore_eos: do not end at the model's end-of-sequence tokens.
        seed: makes the request's draws reproducible, whatever it is batched with; None derives one from the engine's.
        stop: a string or strings that end the text; the text returned ends before the first of them.
        stop_token_ids: further tokens that end the request.
        n: number of texts drawn for the prompt.
        presence_penalty: taken from the logits of tokens that have been generated; in [-2, 2].
        frequency_penalty: taken from a token's logit as often as it has been generated; in [-2, 2].
        repetition_penalty: divides the logits, if positive, of tokens of the prompt or generated, and multiplies
            them, if negative (arXiv 1909.05858); greater than 0, and 1 changes nothing.
        min_tokens: tokens to generate before one may end the request; at most max_tokens.
        logprobs: log-probabilities to return of each token generated: its own, and those of this many most likely
            ones; -1 for the whole vocabulary, None for none at all.
        prompt_logprobs: the same for each token of the prompt.
        logit_bias: numbers added to the logits of token ids (ints, or strings of digits), clamped to [-100, 100].
        bad_words: strings whose tokens are not generated one after another.
        allowed_token_ids: the only tokens that may be generated.
        include_stop_str_in_output: let the text returned end behind the stop string, or the token, that ended it.
        skip_special_tokens: leave special tokens out of the text.
        spaces_between_special_tokens: changes nothing: which spaces a text has, the tokenizer's files say.
        detokenize: make text of the tokens; without, there is no text to look for `stop` in.
        output_kind: what is reported while the request runs.
        structured_outputs: the form that the text must have.
        guided_decoding: the older name of structured_outputs; what is given moves there.
        truncate_prompt_tokens: keep so many last tokens of the prompt; -1 keeps as many as the model takes.
        extra_args, logits_processors: None only, refused with the reason.
        best_of: None or n, otherwise refused with the reason.

    Raises:
        TypeError, ValueError: an option of another type, out of its range, at odds with another, or not supported.
    """

    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    min_p: float = 0.0
    max_tokens: int | None = 64
    ignore_eos: bool = False
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int | str, float] | None = None
    bad_words: Sequence[str] | None = None
    allowed_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    detokenize: bool = True
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    structured_outputs: StructuredOutputsParams | dict[str, Any] | None = None
    guided_decoding: StructuredOutputsParams | dict[str, Any] | None = None
    truncate_prompt_tokens: int | None = None
    extra_args: dict[str, Any] | None = None
    logits_processors: Sequence[Callable[..., Any]] | None = None
    best_of: int | None = None

    @classmethod
    def from_optional(cls, **options: Any) -> "SamplingParams":
        """Options of which None means the default; but max_tokens=None goes as far as the model does."""
        return cls(**{name: value for name, value in options.items() if value is not None or name == "max_tokens"})

    def check(self) -> None:
        """Checks all options and brings them to one form; to be called again when some have been assigned to.

        Afterwards stop, stop_token_ids and bad_words are tuples, allowed_token_ids a tuple or None, logit_bias a
        dict of ints and floats or None, and structured_outputs is what guided_decoding was, which is None.
        """
        refuse_params(self)
        check_fields(self, LIMITS)
        check_lists(self)
        self.structured_outputs = checked_structure(self.structured_outputs, self.guided_decoding)
        self.guided_decoding = None
        if self.top_p == 0:
            raise ValueError("top_p must be greater than 0, got 0")
        if self.truncate_prompt_tokens == 0:
            raise ValueError("truncate_prompt_tokens must be -1 or at least 1, got 0")
        if not isinstance(self.output_kind, RequestOutputKind):
            raise TypeError(f"output_kind must be a RequestOutputKind, got {self.output_kind!r}")
        if self.n > 1 and self.temperature == 0:
            raise ValueError(f"n must be 1 when using greedy sampling (temperature=0), got {self.n}")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens must be at most max_tokens={self.max_tokens}, got {self.min_tokens}")
        if self.stop and not self.detokenize:
            raise ValueError(f"stop needs the text that detokenize=False leaves out, got {self.stop!r}")

    @property
    def is_filtered(self) -> bool:
        """Whether sampling must look at the whole distribution before it draws."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)
