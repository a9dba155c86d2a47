"""The beams of one prompt: which continuations live on, which have ended, and when no better one can come.

The rules are those of transformers' `generate(num_beams=k, early_stopping=False)`, so that the beams are the same.
Nothing here knows where the log probabilities come from, nor of text.
"""

from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from nanovllm.beam_search.params import BeamSearchParams
from nanovllm.outputs import Logprobs


@dataclass
class BeamSearchSequence:
    """One beam.

    Attributes:
        tokens: the prompt's token ids and the generated ones, with the end-of-sequence token if it ended by one.
        logprobs: for each generated token the log probabilities it was chosen from.
        cum_logprob: the sum of the generated tokens' log probabilities, without length penalty.
        text: of all `tokens`, the prompt's and special ones too; without the end-of-sequence token that ended the
            beam, unless `include_stop_str_in_output` asks for it.
        finish_reason: "stop" (by an end-of-sequence token) or "length"; None while it is running.
        stop_reason: the end-of-sequence token's id, None for the others.
    """

    tokens: list[int]
    logprobs: list[Logprobs]
    cum_logprob: float = 0.0
    text: str | None = None
    finish_reason: str | None = None
    stop_reason: int | None = None


@dataclass
class BeamSearchOutput:
    """What beam search gives back of a prompt: `sequences`, the `beam_width` best beams, best first."""

    sequences: list[BeamSearchSequence]


class Candidate:
    """A beam that is not built yet: what it goes on from, and its next token. The best has the least `order`."""

    def __init__(self, index: int, beam: BeamSearchSequence, token_id: int, choices: Logprobs) -> None:
        self.beam = beam
        self.token_id = token_id
        self.choices = choices
        self.cum_logprob = beam.cum_logprob + choices[token_id].logprob
        self.order = (-self.cum_logprob, index, token_id)

    def build(self, finish_reason: str | None = None) -> BeamSearchSequence:
        """The beam one token longer."""
        return BeamSearchSequence(
            tokens=[*self.beam.tokens, self.token_id],
            logprobs=[*self.beam.logprobs, self.choices],
            cum_logprob=self.cum_logprob,
            finish_reason=finish_reason,
            stop_reason=self.token_id if finish_reason == "stop" else None,
        )


class Beams:
    """The search from one prompt.

    Attributes:
        running: beams that wait for their next token, best first; one, the prompt, in the beginning.
        finished: (score, beam) of the best beams that have ended, best first, at most `beam_width`. The score is the
            sum of log probabilities divided by (number of generated tokens ** length_penalty).
        is_done: whether `finished` is the result.
    """

    def __init__(
        self, prompt_ids: Sequence[int], max_tokens: int, params: BeamSearchParams, eos_token_ids: AbstractSet[int]
    ) -> None:
        """Beams end at `max_tokens`, or at one of `eos_token_ids` (empty: never)."""
        self.max_tokens = max_tokens
        self.beam_width = params.beam_width
        self.length_penalty = params.length_penalty
        self.eos_token_ids = eos_token_ids
        self.num_generated = 0
        self.running = [BeamSearchSequence(list(prompt_ids), [])]
        self.finished: list[tuple[float, BeamSearchSequence]] = []
        self.is_done = False

    def advance(self, choices: Sequence[Logprobs]) -> None:
        """Makes every beam one token longer.

        Args:
            choices: for each running beam its most likely tokens, `beam_width + len(eos_token_ids)` at least. They
                hold whatever can be chosen: the best `beam_width` that end no beam, and all that are likelier.
        """
        self.num_generated += 1
        is_last = self.num_generated == self.max_tokens
        ranked = sorted(self._candidates(choices), key=lambda candidate: candidate.order)
        self.running = []
        for rank, candidate in enumerate(ranked):
            is_eos = candidate.token_id in self.eos_token_ids
            if not is_eos and not is_last:
                self.running.append(candidate.build())
                if len(self.running) == self.beam_width:
                    break
            elif rank < self.beam_width:  # an end that is less likely is forgotten
                beam = candidate.build("stop" if is_eos else "length")
                self.finished.append((self._score(beam), beam))
        self.finished.sort(key=lambda scored: -scored[0])
        del self.finished[self.beam_width :]
        self.is_done = is_last or not self._can_improve()

    def _candidates(self, choices: Sequence[Logprobs]) -> Iterator[Candidate]:
        """All continuations of the running beams that are known."""
        for index, (beam, top) in enumerate(zip(self.running, choices, strict=True)):
            for token_id in top:
                yield Candidate(index, beam, token_id, top)

    def _score(self, beam: BeamSearchSequence) -> float:
        """What beams are compared by once they have ended, of a beam that is as long as the running ones."""
        return beam.cum_logprob / self.num_generated**self.length_penalty

    def _can_improve(self) -> bool:
        """Whether the best running beam, ended now, would be among the best; it may still become better or worse."""
        return len(self.finished) < self.beam_width or self._score(self.running[0]) > self.finished[-1][0]
