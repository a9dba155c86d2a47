"""What a beam search is asked for. Knows nothing of how it goes, nor of what an engine can give it."""

from dataclasses import dataclass

from nanovllm.options.checks import LARGEST_FLOAT32, Limits, Options, check_fields

BEAM_LIMITS: Limits = {  # lowest, highest
    "beam_width": (1,),
    "max_tokens": (1,),
    "temperature": (0, LARGEST_FLOAT32),
    "length_penalty": (-LARGEST_FLOAT32, LARGEST_FLOAT32),
}


@dataclass(repr=False, slots=True)
class BeamSearchParams(Options):
    """Options of a beam search.

    Attributes:
        beam_width: number of beams kept and of texts returned.
        max_tokens: most tokens to generate.
        ignore_eos: do not end a beam at the model's end-of-sequence tokens.
        temperature: 0 or 1, which both leave the logits as they are; a search refuses others.
        length_penalty: a finished beam's score is divided by its length to this power.
        include_stop_str_in_output: keep the end-of-sequence token's text.

    Raises:
        TypeError, ValueError: an option of another type or out of its range.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False

    def check(self) -> None:
        """Checks all options; to be called again when some have been assigned to."""
        check_fields(self, BEAM_LIMITS)
