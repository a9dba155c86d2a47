"""How a text ends before its length does: by the model, by what the request asks for, or by a constraint."""

from typing import TYPE_CHECKING

from nanovllm.config import Config
from nanovllm.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from nanovllm.engine.sequence import Sequence


def find_eos_token_ids(config: Config, tokenizer: Tokenizer | None) -> frozenset[int]:
    """What ends a text by the model's files or by the tokenizer's: fine-tunes may change the latter alone."""
    of_tokenizer = tokenizer.eos_token_id if tokenizer is not None else None
    return config.model_config.eos_token_ids | ({of_tokenizer} - {None})


def ends_text(seq: "Sequence", token_id: int, eos_token_ids: frozenset[int]) -> bool:
    """Whether a sequence's newest token, of which its text and its constraint hear here, ends it."""
    params = seq.sampling_params
    is_eos = token_id in eos_token_ids and not params.ignore_eos
    if is_eos or token_id in params.stop_token_ids:
        seq.has_end_token, seq.stop_reason = True, None if is_eos else token_id
        # The text of such a token is no part of the sequence's, unless that is asked for.
        if seq.detokenizer is not None and params.include_stop_str_in_output:
            seq.detokenizer.push([token_id], finds_stops=False)
        return True
    if seq.detokenizer is not None:
        has_least_tokens = len(seq.token_ids) - seq.num_prompt_tokens > params.min_tokens
        seq.stop_reason = seq.detokenizer.push([token_id], has_least_tokens)
        if seq.stop_reason is not None:
            return True
    if seq.constraint is None:
        return False
    seq.constraint.accept(token_id)
    return seq.constraint.is_finished
