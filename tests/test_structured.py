"""Structured outputs: whatever tokens a grammar lets through, the text has the structure that was asked for."""

from __future__ import annotations

import json
import random
import re
import threading
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from engines import check_idle, engine
from schemas import with_definitions

from nanovllm import SamplingParams
from nanovllm.checkpoint.files import read_json
from nanovllm.sampling_params import GuidedDecodingParams, StructuredOutputsParams
from nanovllm.structured import Constraint, GrammarCompiler, make_constraint
from nanovllm.structured.constraints import BadWords
from nanovllm.text.tokenizer import Tokenizer, load_tokenizer

DEMO = "nanovllm/demo"
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "age"],
}


class Model:
    """Draws random tokens that a constraint allows, and prefers such as end the text once it is long."""

    def __init__(self) -> None:
        self.tokenizer: Tokenizer = load_tokenizer(DEMO)
        self.vocab_size = read_json(f"{DEMO}/config.json")["vocab_size"]
        self.eos = self.tokenizer.eos_token_id
        self.compiler = GrammarCompiler(self.tokenizer, self.vocab_size, [self.eos])
        self.closing = {self.tokenizer.encode(text)[0] for text in '"}]'}

    def constraint(self, structure: StructuredOutputsParams) -> Constraint:
        self.compiler.validate(structure)
        return make_constraint(self.compiler.compile(structure).result(), [])

    def allowed(self, constraint: Constraint) -> list[int]:
        mask = np.zeros(-(-self.vocab_size // 32), dtype=np.int32)
        constraint.fill_mask(mask)
        return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")[: self.vocab_size]).tolist()

    def text(self, structure: StructuredOutputsParams, rng: random.Random, most: int = 600) -> str | None:
        """A random text; None if it has not ended after so many tokens."""
        constraint, token_ids = self.constraint(structure), []
        while not constraint.is_finished:
            allowed = self.allowed(constraint)
            assert allowed, f"nothing may follow {self.tokenizer.decode(token_ids)!r}"
            closing = [token_id for token_id in allowed if token_id in self.closing]
            if self.eos in allowed and (len(token_ids) > 150 or rng.random() < 0.3):
                token_id = self.eos
            elif closing and len(token_ids) > 150 and rng.random() < 0.7:
                token_id = rng.choice(closing)
            else:
                token_id = rng.choice(allowed)
            constraint.accept(token_id)
            token_ids.append(token_id)
            if len(token_ids) == most:
                return None
        assert token_ids.pop() == self.eos
        return self.tokenizer.decode(token_ids)


@pytest.fixture(scope="module")
def model() -> Model:
    return Model()


def check_schemas(model: Model, seeds: range) -> None:
    num_ended = 0
    for seed in seeds:
        rng = random.Random(seed)
        schema = with_definitions(rng)
        text = model.text(StructuredOutputsParams(json=schema, disable_any_whitespace=rng.random() < 0.7), rng)
        if text is not None:
            num_ended += 1
            jsonschema.Draft202012Validator(schema).validate(json.loads(text))
    assert num_ended > 0.9 * len(seeds)


def test_texts_are_valid_by_their_schemas(model):
    check_schemas(model, range(60))


@pytest.mark.slow
def test_texts_are_valid_by_a_thousand_schemas(model):
    check_schemas(model, range(10_000, 11_100))


EXPRESSIONS = [
    r"[0-9]{3}-[a-z]{4}", r"(yes|no)!*", r"\d+(\.\d{1,2})?", r".{0,9}é\"", r"[^é\s]{1,4}", r"a{2,}b?", r"^x$|y",
    r"\w{1,9}@\w{1,9}\.(com|org)", r"", r"(a|)(b|c){2}",
]  # fmt: skip


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_texts_match_their_expression(model, expression):
    rng = random.Random(1)
    texts = [model.text(StructuredOutputsParams(regex=expression or "()"), rng) for _ in range(4)]
    assert all(re.fullmatch(expression, text) for text in texts if text is not None)
    assert any(text is not None for text in texts)


def test_choices_are_texts_as_they_stand(model):
    choices = ["yes", "no", 'say "hi"\n\\', "größer 👋", "a|b", "yes, but"]
    structure = StructuredOutputsParams(choice=choices)
    rng = random.Random(0)
    assert {model.text(structure, rng) for _ in range(60)} == set(choices)


def test_grammars_and_objects(model):
    rng = random.Random(3)
    grammar = 'root ::= term (("+" | "-") term)*\nterm ::= [0-9]+ | "(" root ")"'
    for _ in range(10):
        text = model.text(StructuredOutputsParams(grammar=grammar), rng, most=200)
        assert text is None or re.fullmatch(r"[0-9+()-]+", text)
    for _ in range(5):
        text = model.text(StructuredOutputsParams(json_object=True), rng)
        assert text is None or isinstance(json.loads(text), dict)


REFUSED = [
    ({"json": "{"}, "is no JSON"),
    ({"json": "[]"}, "must be an object, got \\[\\]"),
    ({"json": {"type": "number", "multipleOf": 2}}, "#/multipleOf is not supported"),
    ({"json": {"type": "array", "uniqueItems": True}}, "#/uniqueItems is not supported"),
    ({"json": {"type": "object", "patternProperties": {}}}, "#/patternProperties is not supported"),
    ({"json": {"type": "object", "properties": {"a": {"not": {}}}}}, "#/properties/a/not is not supported"),
    ({"json": {"oneOf": [{}]}}, "#/oneOf is not supported"),
    ({"json": {"minimum": 3}}, "#/minimum is not supported beside a schema without a type"),
    ({"json": {"type": "any"}}, "#/type must be one of"),
    ({"json": {"enum": []}}, "#/enum must be a list of values"),
    ({"json": {"type": "integer", "enum": ["a"]}}, "no value of its type"),
    ({"json": {"$ref": "#/$defs/x"}}, "#/\\$ref must be '#' or name one of"),
    ({"json": {"$ref": "#"}}, "refers to itself"),
    ({"json": {"anyOf": [{"$ref": "#"}]}}, "refers to itself"),
    ({"json": {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}}, "refers to itself"),
    ({"json": {"type": "string", "maxLength": 10**9}}, "#/maxLength must be an integer between 0 and 10000"),
    ({"json": {"type": "string", "minLength": 3, "maxLength": 2}}, "#/maxLength must be at least minLength=3, got 2"),
    ({"json": {"type": "string", "pattern": "("}}, "regular expression"),
    ({"json": {"type": "string", "pattern": "a", "maxLength": 2}}, "pattern and length"),
    ({"regex": "(?i)a"}, "flags"),
    ({"regex": "a("}, "regular expression"),
    ({"grammar": "root ::= x"}, "cannot be used"),
    ({"grammar": "start: 'a'"}, "cannot be used"),
]


@pytest.mark.parametrize(("structure", "match"), REFUSED)
def test_what_cannot_be_honoured_is_refused(model, structure, match):
    with pytest.raises(ValueError, match=match):
        model.compiler.validate(StructuredOutputsParams(**structure))


def test_bad_words_are_banned_behind_their_first_tokens():
    rng, vocab_size = random.Random(0), 70
    words = [[rng.randrange(vocab_size) for _ in range(rng.randint(2, 3))] for _ in range(40)] + [[31, 31], [0, 31]]
    constraint, generated = BadWords(words), []
    mask = np.zeros(3, dtype=np.int32)
    for _ in range(300):
        constraint.fill_mask(mask)
        banned = {word[-1] for word in words if generated[-len(word) + 1 :] == word[:-1]}
        bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
        assert set(np.flatnonzero(bits[:vocab_size] == 0)) == banned
        generated.append(rng.randrange(vocab_size))
        constraint.accept(generated[-1])


# ---- in the engine ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llm():
    with engine(DEMO, max_model_len=256) as llm:
        yield llm


def test_requests_of_all_kinds_at_once(llm):
    structures = [
        StructuredOutputsParams(choice=["yes", "no"]),
        StructuredOutputsParams(regex=r"[a-z]{3} [0-9]{2}"),
        StructuredOutputsParams(json=PERSON, disable_any_whitespace=True),
        None,
    ]
    params = [
        SamplingParams(n=3, seed=5, max_tokens=60, structured_outputs=structure, presence_penalty=0.5, logprobs=1)
        for structure in structures
    ]
    prompts = ["What is a block table?"] * 4
    chosen, matching, people, free = llm.generate(prompts, params, use_tqdm=False)
    assert all(sample.text in ("yes", "no") and sample.finish_reason == "stop" for sample in chosen.outputs)
    assert all(re.fullmatch(r"[a-z]{3} [0-9]{2}", sample.text) for sample in matching.outputs)
    for sample in people.outputs:
        jsonschema.validate(json.loads(sample.text), PERSON)
    alone = llm.generate(prompts[:1], params[3:], use_tqdm=False)[0]
    assert [sample.token_ids for sample in alone.outputs] == [sample.token_ids for sample in free.outputs]
    check_idle(llm)


def test_bad_words(llm):
    params = SamplingParams(temperature=0, max_tokens=30)
    text = llm.generate("What is a block table?", params, use_tqdm=False)[0].text
    words = [text.split()[1], " ".join(text.split()[3:6])]
    other = llm.generate(
        "What is a block table?", SamplingParams(temperature=0, max_tokens=30, bad_words=words), False
    )
    assert not any(word in other[0].text for word in words)


def test_the_older_name(llm):
    params = SamplingParams(guided_decoding=GuidedDecodingParams(choice=["left", "right"]))
    assert llm.generate("Which way?", params, use_tqdm=False)[0].text in ("left", "right")


def test_a_grammar_that_ends_does_so_without_eos_too(llm):
    params = SamplingParams(structured_outputs={"choice": ["one"]}, ignore_eos=True, max_tokens=40)
    result = llm.generate("A number", params, use_tqdm=False)[0]
    assert (result.text, result.finish_reason) == ("one", "stop")


def test_compiling_stops_no_other_request(llm, monkeypatch):
    """A request goes on, and ends, while another one's grammar takes its time."""
    may_end = threading.Event()
    compile_grammar = llm.intake.grammars.compiler.compile_grammar
    slow = type("", (), {"compile_grammar": lambda self, grammar: may_end.wait(60) and compile_grammar(grammar)})()
    monkeypatch.setattr(llm.intake.grammars, "compiler", slow)
    waiting = llm.add_request("a", "Which?", SamplingParams(structured_outputs={"choice": ["x", "y"]}))
    other = llm.add_request("b", "What?", SamplingParams(max_tokens=5, ignore_eos=True))
    ended = []
    while not ended:
        ended += [output.request_id for output in llm.step() if output.finished]
    assert ended == [other]
    may_end.set()
    while not llm.is_finished():
        ended += [output.request_id for output in llm.step() if output.finished]
    assert ended == [other, waiting]
    check_idle(llm)


def test_a_request_whose_grammar_waits_can_be_aborted(llm, monkeypatch):
    may_end = threading.Event()
    slow = type("", (), {"compile_grammar": lambda self, grammar: may_end.wait(60)})()
    monkeypatch.setattr(llm.intake.grammars, "compiler", slow)
    llm.add_request("a", "Which?", SamplingParams(structured_outputs={"choice": ["x", "y"]}))
    llm.step()
    llm.abort_request("a")
    may_end.set()
    assert llm.step() == []
    check_idle(llm)


def test_refused_before_anything_is_queued(llm):
    bad = SamplingParams(structured_outputs={"json": {"type": "array", "uniqueItems": True}})
    with pytest.raises(ValueError, match="structured_outputs cannot be used: #/uniqueItems is not supported"):
        llm.generate(["a", "b"], [SamplingParams(), bad], use_tqdm=False)
    check_idle(llm)


@pytest.mark.parametrize("max_num_batched_tokens", [5, 7, 4096])
def test_constrained_requests_leave_the_others_alone(max_num_batched_tokens):
    """They sit out every other step, so that more requests may run than a step has tokens for."""
    prompts = [[100 + i] for i in range(10)]
    words = ["What is a block"]
    params = [SamplingParams(temperature=0, max_tokens=6, bad_words=words if i < 5 else None) for i in range(10)]
    with engine(DEMO, max_num_seqs=24, max_num_batched_tokens=max_num_batched_tokens) as llm:
        results = llm.generate(prompts, params, use_tqdm=False)
        alone = [llm.generate([prompt], params[5], use_tqdm=False)[0] for prompt in prompts]
    assert [result.token_ids for result in results] == [result.token_ids for result in alone]


def test_bad_words_beyond_the_models_vocabulary(tmp_path):
    """A tokenizer may know more tokens than the model: those cannot come, and ban nothing of other requests."""
    from safetensors.torch import load_file, save_file

    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text(Path(DEMO, name).read_text())
    config = json.loads((tmp_path / "config.json").read_text())
    vocab_size = 2000
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": vocab_size}))
    tensors = load_file(f"{DEMO}/model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:vocab_size].contiguous()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    tokenizer = load_tokenizer(DEMO)
    texts = [tokenizer.token_text(token_id) for token_id in range(vocab_size, tokenizer.backend.get_vocab_size())]
    word = next(text for text in texts if text.isalpha())
    (banned,) = tokenizer.encode(word)
    other = {banned - vocab_size: 100.0}
    params = [
        SamplingParams(temperature=0, max_tokens=3, bad_words=[word, f"What{word}"]),
        SamplingParams(temperature=0, max_tokens=3, logit_bias=other, presence_penalty=0.1),
    ]
    with engine(str(tmp_path)) as llm:
        results = llm.generate([[5], [6]], params, use_tqdm=False)
    assert results[1].token_ids == [banned - vocab_size] * 3
