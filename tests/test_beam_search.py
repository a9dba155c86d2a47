"""Beams are those of transformers: tokens, order and scores, over families, widths, penalties and ends."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from checkpoints import EOS_TOKEN_IDS, VOCAB_SIZE, Checkpoint, random_prompt
from engines import check_idle, engine
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

import nanovllm.demo
from nanovllm import LLM, SamplingParams
from nanovllm.beam_search import BeamSearchOutput, BeamSearchSequence
from nanovllm.beam_search.beams import Beams
from nanovllm.beam_search.search import beam_search
from nanovllm.outputs import Logprob
from nanovllm.sampling_params import BeamSearchParams

DEMO = Path(nanovllm.demo.__file__).parent
OFTEN = [*range(200, 240)]  # so many that beams end early
PROMPTS = [random_prompt(length, length) for length in (3, 40, 17)]
FEW = {"max_model_len": 100, "max_num_seqs": 3, "max_num_batched_tokens": 24, "num_kvcache_blocks": 8}
# Widths, lengths, penalties and ends; the checkpoint's own ends are rare, and the last case has none.
CASES = [
    (BeamSearchParams(2, 9, length_penalty=0.0), OFTEN),
    (BeamSearchParams(5, 8, length_penalty=0.6), OFTEN),
    (BeamSearchParams(3, 12, length_penalty=1.0), EOS_TOKEN_IDS),
    (BeamSearchParams(4, 6, length_penalty=2.0, ignore_eos=True), OFTEN),
]


@torch.inference_mode()
def expected(
    model: PreTrainedModel, prompt: list[int], params: BeamSearchParams, eos_token_ids
) -> list[tuple[list[int], float]]:
    """transformers' beams, best first, as (tokens, score)."""
    config = GenerationConfig(
        num_beams=params.beam_width,
        num_return_sequences=params.beam_width,
        length_penalty=params.length_penalty,
        max_new_tokens=params.max_tokens,
        early_stopping=False,
        do_sample=False,
        # No token has the id of the vocabulary's size.
        eos_token_id=[model.config.vocab_size] if params.ignore_eos else list(eos_token_ids),
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    ids = torch.tensor([prompt])
    result = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    lengths = len(prompt) + (result.beam_indices >= 0).sum(dim=1)
    beams = zip(result.sequences.tolist(), lengths.tolist(), result.sequences_scores.tolist(), strict=True)
    return [(tokens[:length], score) for tokens, length, score in beams]


def check_beams(model: PreTrainedModel, output: BeamSearchOutput, prompt: list[int], params, eos_token_ids) -> None:
    """The beams are transformers', and what they say of themselves is true."""
    want = expected(model, prompt, params, eos_token_ids)
    assert [beam.tokens for beam in output.sequences] == [tokens for tokens, _ in want]
    for beam, (_, score) in zip(output.sequences, want, strict=True):
        generated = beam.tokens[len(prompt) :]
        assert beam.cum_logprob / len(generated) ** params.length_penalty == pytest.approx(score, abs=1e-4, rel=1e-6)
        chosen = [top[token_id].logprob for token_id, top in zip(generated, beam.logprobs, strict=True)]
        assert sum(chosen) == pytest.approx(beam.cum_logprob)
        is_stop = generated[-1] in eos_token_ids and not params.ignore_eos
        assert (beam.finish_reason, beam.stop_reason) == (("stop", generated[-1]) if is_stop else ("length", None))


def check_search(llm: LLM, model: PreTrainedModel, prompts, params: BeamSearchParams, eos_token_ids) -> list[str]:
    """Searches from prompts in an engine whose texts end by `eos_token_ids`; returns the finish reasons."""
    prompts = [list(prompt) for prompt in prompts]
    llm.scheduler.eos_token_ids = frozenset(eos_token_ids)
    outputs = beam_search(llm, prompts, params)
    check_idle(llm)
    for prompt, output in zip(prompts, outputs, strict=True):
        check_beams(model, output, prompt, params, eos_token_ids)
    return [beam.finish_reason for output in outputs for beam in output.sequences]


@pytest.mark.parametrize("family", ["qwen3", "llama", "qwen2", "mistral"])
def test_beams_are_those_of_transformers(checkpoint, family):
    model = checkpoint(family).model
    with engine(checkpoint(family).path, max_logprobs=64) as llm:
        reasons = [check_search(llm, model, PROMPTS, params, eos_token_ids) for params, eos_token_ids in CASES]
    assert {"stop", "length"} == {*reasons[0], *reasons[1]}
    assert {"length"} == {*reasons[3]}


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, FEW])
@pytest.mark.parametrize("family", ["qwen3", "llama", "llama_bias", "qwen2", "mistral"])
def test_random_searches(checkpoint, family, options):
    """120 searches, whatever they ask for; with few rows, blocks and tokens a step too."""
    generator = random.Random(family)
    with engine(checkpoint(family).path, max_logprobs=VOCAB_SIZE, **options) as llm:
        for seed in range(40):
            penalty = generator.choice([-1.0, 0.0, 0.6, 1.0, 2.0])
            params = BeamSearchParams(generator.randrange(2, 9), generator.randrange(1, 20), length_penalty=penalty)
            eos_token_ids = generator.sample(range(VOCAB_SIZE), generator.choice([1, 2, 7, 40, 80]))
            prompts = [random_prompt(3 * seed + index, generator.randrange(1, 60)) for index in range(3)]
            check_search(llm, checkpoint(family).model, prompts, params, eos_token_ids)


def test_one_beam_is_greedy_search_until_the_model_ends(checkpoint: Checkpoint):
    """A prompt that fills the model's length but for five tokens has beams of five."""
    qwen3 = checkpoint("qwen3")
    prompts = [random_prompt(1, 295), random_prompt(2, 20)]
    with engine(qwen3.path) as llm:
        llm.scheduler.eos_token_ids = frozenset(EOS_TOKEN_IDS)
        outputs = beam_search(llm, [list(prompt) for prompt in prompts], BeamSearchParams(1, 12, ignore_eos=True))
    beams = [beam for output in outputs for beam in output.sequences]
    assert [beam.tokens[:295] for beam in beams[:1]] == [list(prompts[0])]
    for beam, prompt, max_tokens in zip(beams, prompts, (5, 12), strict=True):
        assert beam.tokens[len(prompt) :] == qwen3.greedy(prompt, max_tokens, ignore_eos=True)[0]


def test_a_step_is_one_call_and_hits_the_prefix_cache(checkpoint, monkeypatch):
    calls = []
    with engine(checkpoint("qwen3").path) as llm:
        generate = llm.generate

        def recorded_generate(*args, **options):
            calls.append(generate(*args, **options))
            return calls[-1]

        monkeypatch.setattr(llm, "generate", recorded_generate)
        params = BeamSearchParams(3, 4, ignore_eos=True)
        outputs = beam_search(llm, [list(random_prompt(1, 100)), {"prompt_token_ids": [5, 6]}], params, use_tqdm=True)
    assert [len(output.sequences) for output in outputs] == [3, 3]
    assert [len(results) for results in calls if results] == [2, 6, 6, 6]
    assert [[result.num_cached_tokens for result in results] for results in calls[1:4]] == [[96] * 3 + [0] * 3] * 3


def test_texts_of_the_demo_are_transformers():
    """Prompts as text; the text of a beam is that of all its tokens, its end's only if asked for."""
    line = json.loads((DEMO / "questions.jsonl").read_text(encoding="utf-8").splitlines()[0])
    known = line["answer"][:-20].rsplit(" ", 1)[0]
    ending = line["answer"][len(known) :]
    text = f"<|im_start|>user\n{line['question']}<|im_end|>\n<|im_start|>assistant\n{known}"
    model = AutoModelForCausalLM.from_pretrained(DEMO).float()
    params = BeamSearchParams(3, 16)
    with LLM(str(DEMO), device="cpu", dtype="float32", max_model_len=512) as llm:
        outputs = llm.beam_search([text, {"prompt": "Once"}], params)
        whole = llm.beam_search([{"prompt": text}], BeamSearchParams(3, 16, include_stop_str_in_output=True))
        for output, prompt in zip(outputs, (text, "Once"), strict=True):
            check_beams(model, output, llm.tokenizer.encode(prompt), params, llm.scheduler.eos_token_ids)
    assert outputs[0].sequences[0].text == text + ending
    assert whole[0].sequences[0].text == text + ending + "<|im_end|>"


def choices(*logprobs: dict[int, float]) -> list[dict[int, Logprob]]:
    """What an engine says of beams, from numbers alone."""
    return [{token_id: Logprob(value, None, None) for token_id, value in top.items()} for top in logprobs]


def test_equal_beams_keep_their_order():
    """The earlier beam first, then the lower token, then what has ended earlier."""
    beams = Beams([7], 3, BeamSearchParams(2, 3, length_penalty=0.0), frozenset([0]))
    beams.advance(choices({4: -1.0, 2: -1.0, 3: -1.0}))
    assert [beam.tokens for beam in beams.running] == [[7, 2], [7, 3]]
    beams.advance(choices({9: -1.0, 5: -2.0, 0: -2.0}, {8: -1.0, 0: -1.0, 5: -3.0}))
    assert [beam.tokens for beam in beams.running] == [[7, 2, 9], [7, 3, 8]]
    assert [(score, beam.tokens) for score, beam in beams.finished] == [(-2.0, [7, 3, 0])]  # the other was fourth
    assert not beams.is_done
    beams.advance(choices({1: -1.0, 0: 0.0, 5: -2.0}, {1: -1.0, 0: 0.0, 5: -2.0}))
    assert [(score, beam.tokens) for score, beam in beams.finished] == [(-2.0, [7, 3, 0]), (-2.0, [7, 2, 9, 0])]
    assert beams.is_done


def test_what_cannot_be_searched_is_refused(checkpoint):
    with engine(checkpoint("qwen3").path) as llm:
        for error, message, params in [
            (TypeError, "BeamSearchParams", SamplingParams()),
            (ValueError, "max_logprobs=27", BeamSearchParams(20, 5)),
            (ValueError, "temperature must be 0", BeamSearchParams(2, 5, temperature=0.7)),
            (ValueError, "length_penalty must be at most 37.93", BeamSearchParams(2, 10, length_penalty=-38)),
        ]:
            with pytest.raises(error, match=message):
                beam_search(llm, [[1, 2]], params)
        with pytest.raises(ValueError, match=f"{VOCAB_SIZE - 1}"):
            beam_search(llm, [[1, 2], [VOCAB_SIZE]], BeamSearchParams(2, 5))
        params = BeamSearchParams(2, 5)
        params.beam_width = 0
        with pytest.raises(ValueError, match="beam_width must be"):
            beam_search(llm, [[1, 2]], params)
        assert beam_search(llm, [], BeamSearchParams(2, 5)) == []
        check_idle(llm)


def test_beams_print_and_compare():
    first = BeamSearchSequence([1, 2], [], -0.5)
    assert first == BeamSearchSequence([1, 2], [], -0.5) and "cum_logprob=-0.5" in repr(BeamSearchOutput([first]))
