"""A request: one or several samples of a prompt, and what it gives back of them.

Nothing here knows of steps or devices; what the samples' tokens are, they know themselves.
"""

import time
from dataclasses import dataclass, field
from functools import cached_property

from nanovllm.config import Config
from nanovllm.engine.sequence import Sequence
from nanovllm.outputs import CompletionOutput, RequestMetrics, RequestOutput
from nanovllm.sampling_params import RequestOutputKind, SamplingParams
from nanovllm.text.detokenizer import REPLACEMENT
from nanovllm.text.tokenizer import Tokenizer


@dataclass(eq=False)
class Request:
    """A request as the engine keeps it.

    Attributes:
        request_id: the id that the caller gave it, or else its number.
        prompt: the text, None if the prompt was token ids.
        params: what it asks for.
        results: where its result is to be put, by the id of its first sequence.
        seqs: its samples, whose ids follow each other.
        arrival_time: when it was made, in seconds of time.time().
        reports_progress: whether `step` hands it out whenever it has new tokens.
        error: why it failed, if it did.
    """

    request_id: str
    prompt: str | None
    params: SamplingParams
    results: dict[int, RequestOutput]
    reports_progress: bool = False
    seqs: list[Sequence] = field(default_factory=list)
    arrival_time: float = field(default_factory=time.time)
    error: str | None = None

    @property
    def number(self) -> int:
        """The id of its first sample, by which the engine knows it."""
        return self.seqs[0].seq_id

    @property
    def is_finished(self) -> bool:
        """Whether all samples have ended."""
        return all(seq.is_finished for seq in self.seqs)

    @cached_property
    def prompt_token_ids(self) -> list[int]:
        """Those of the prompt, which all outputs share: a copy for each token would take long."""
        return self.seqs[0].token_ids[: self.seqs[0].num_prompt_tokens]

    def output(self, tokenizer: Tokenizer | None) -> RequestOutput:
        """What the request gives back so far."""
        outputs = [self._completion(index, seq, tokenizer) for index, seq in enumerate(self.seqs)]
        first, seqs, is_finished = self.seqs[0], self.seqs, self.is_finished
        output = RequestOutput(
            text=outputs[0].text,
            token_ids=outputs[0].token_ids,
            finish_reason=outputs[0].finish_reason,
            num_cached_tokens=max(first.num_cached_tokens, 0),
            num_draft_tokens=sum(seq.drafts.num_checked for seq in seqs),
            num_accepted_tokens=sum(seq.drafts.num_accepted for seq in seqs),
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            prompt_logprobs=first.logprobs.prompt_logprobs if first.logprobs is not None else None,
            outputs=outputs,
            finished=is_finished,
            metrics=RequestMetrics(
                arrival_time=self.arrival_time,
                first_scheduled_time=first.first_scheduled_time,
                first_token_time=first.first_token_time,
                finished_time=max(seq.finished_time for seq in seqs) if is_finished else None,
            ),
        )
        if self.error is not None:
            output["error"] = self.error
        return output

    def explain(self, seq: Sequence, config: Config) -> str:
        """Why a sample ended by an error."""
        return (
            f"request {self.request_id} failed: after its prompt of {seq.num_prompt_tokens} tokens and "
            f"{len(seq.completion_token_ids)} more, the logits hold no finite maximum; check "
            f"dtype={config.dtype!r}, as float16 overflows where others do not, and the weights in "
            f"{config.model!r}, which may hold NaN; or its parameters allow no token"
        )

    def _completion(self, index: int, seq: Sequence, tokenizer: Tokenizer | None) -> CompletionOutput:
        """One sample's tokens: all of them, or with RequestOutputKind.DELTA those that were not handed out yet."""
        record = seq.logprobs
        logprobs = record.logprobs if record is not None else None
        if self.reports_progress and self.params.output_kind is RequestOutputKind.DELTA:
            text = seq.detokenizer.take(seq.is_finished) if seq.detokenizer is not None else ""
            token_ids = seq.token_ids[seq.num_prompt_tokens + seq.num_handed_out :]
            logprobs = logprobs[seq.num_handed_out :] if logprobs is not None else None
            seq.num_handed_out += len(token_ids)
        else:
            token_ids = seq.completion_token_ids
            text = self._text(seq, token_ids, tokenizer)
            logprobs = list(logprobs) if logprobs is not None else None
        return CompletionOutput(
            index=index,
            text=text,
            token_ids=token_ids,
            cumulative_logprob=record.cumulative if logprobs is not None else None,
            logprobs=logprobs,
            finish_reason=seq.finish_reason,
            stop_reason=seq.stop_reason,
        )

    def _text(self, seq: Sequence, token_ids: list[int], tokenizer: Tokenizer | None) -> str:
        if seq.detokenizer is not None:
            return seq.detokenizer.final_text(seq.is_finished)
        if tokenizer is None or not self.params.detokenize:
            return ""
        if seq.has_end_token and not self.params.include_stop_str_in_output:
            token_ids = token_ids[:-1]
        return tokenizer.decode(token_ids, self.params.skip_special_tokens).rstrip(REPLACEMENT)
