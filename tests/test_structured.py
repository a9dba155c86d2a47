"""Structured outputs: whatever tokens a grammar lets through, the text has the structure that was asked for."""

from __future__ import annotations

import itertools
import json
import random
import re
import threading
from collections.abc import Callable
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from engines import check_idle, engine
from schemas import SchemaMaker
from tokenizer_kinds import KINDS

from nanovllm import SamplingParams
from nanovllm.expressions.formats import FORMATS
from nanovllm.sampling.constraints import BadWords, Constraint, make_constraint
from nanovllm.sampling_params import GuidedDecodingParams, StructuredOutputsParams
from nanovllm.structured import GrammarCompiler, compiler
from nanovllm.structured.compiler import token_bytes
from nanovllm.text.tokenizer import load_tokenizer

DEMO = "nanovllm/demo"
FORMAT_CHECKER = jsonschema.Draft202012Validator.FORMAT_CHECKER
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "age"],
}


class Model:
    """Draws random tokens that a constraint allows, and prefers such as end the text."""

    def __init__(self, folder: str, has_end: bool = True) -> None:
        self.tokenizer = load_tokenizer(folder)
        self.vocab_size = self.tokenizer.backend.get_vocab_size() + 70  # logits that no token has
        self.eos = self.tokenizer.eos_token_id
        self.compiler = GrammarCompiler(self.tokenizer, self.vocab_size, [self.eos] if has_end else [])
        tokens = token_bytes(self.tokenizer, self.vocab_size)
        self.closes = np.array([re.fullmatch(rb'["\]}]+', token) is not None for token in tokens])
        self.is_space = np.array([token[:1].isspace() for token in tokens])

    def constraint(self, **structure: object) -> Constraint:
        return make_constraint(self.compiler.compile(StructuredOutputsParams(**structure)).result(), [])

    def allowed(self, constraint: Constraint) -> np.ndarray:
        mask = np.zeros(-(-self.vocab_size // 32), dtype=np.int32)
        constraint.fill_mask(mask)
        return np.unpackbits(mask.view(np.uint8), bitorder="little")[: self.vocab_size].astype(bool)

    def text(self, rng: random.Random, **structure: object) -> str | None:
        """A random text; None if it has not ended after 1,000 tokens."""
        constraint, token_ids = self.constraint(**structure), []
        while not constraint.is_finished:
            allowed = self.allowed(constraint)
            assert allowed.any(), f"nothing may follow {self.tokenizer.decode(token_ids)!r}"
            if len(token_ids) == 1000:
                return None
            if allowed[self.eos] and (len(token_ids) > 100 or rng.random() < 0.4):
                token_ids.append(self.eos)
            else:
                wishes = [self.closes] if len(token_ids) > 150 or rng.random() < 0.4 else []
                wishes += [~self.is_space] if rng.random() < 0.8 else []
                for wish in wishes:
                    allowed = allowed & wish if (allowed & wish).any() else allowed
                token_ids.append(int(rng.choice(np.flatnonzero(allowed))))
            constraint.accept(token_ids[-1])
        assert token_ids.pop() == self.eos
        return self.tokenizer.decode(token_ids)

    def accepts(self, text: str, **structure: object) -> bool:
        """Whether a text may be generated, character by character, and may end then."""
        constraint = self.constraint(**structure)
        for character in text:
            for token_id in self.tokenizer.encode(character):
                if not self.allowed(constraint)[token_id]:
                    return False
                constraint.accept(token_id)
        return bool(self.allowed(constraint)[self.eos])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model by the kind of its tokenizer; made once."""
    made: dict[str, Model] = {}

    def get(kind: str) -> Model:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            if kind != "demo":
                KINDS[kind](folder)
            made[kind] = Model(DEMO if kind == "demo" else str(folder))
        return made[kind]

    return get


@pytest.fixture(scope="module")
def model(models):
    return models("demo")


# ---- JSON schemas -------------------------------------------------------------------------------------------------


def check_schemas(model: Model, seeds: range) -> None:
    for seed in seeds:
        schema, rng = SchemaMaker(seed).make(), random.Random(seed)
        validator = jsonschema.Draft202012Validator(schema, format_checker=FORMAT_CHECKER)
        for is_compact in (True, False):
            text = model.text(rng, json=schema, disable_any_whitespace=is_compact)
            error = next(validator.iter_errors(json.loads(text)), None)
            assert error is None, f"seed {seed}: {text} does not follow {schema}: {error.message}"


@pytest.mark.parametrize("kind", ["demo", "byte_level", "metaspace_bpe", "gemma_bpe"])
def test_texts_follow_their_schemas(models, kind):
    check_schemas(models(kind), range(12))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["demo", "byte_level", "metaspace_bpe"])
def test_texts_follow_a_thousand_schemas(models, kind):
    check_schemas(models(kind), range(10_000, 11_000))


@pytest.mark.parametrize("name", FORMATS)
def test_texts_have_their_format(model, name):
    rng = random.Random(0)
    texts = [loaded(model.text(rng, json={"type": "string", "format": name})) for _ in range(4)]
    assert texts.count(None) < 3
    for text in filter(None, texts):
        assert re.fullmatch(FORMATS[name], text)
        if name != "relative-json-pointer":  # jsonschema takes no digit behind a 0
            FORMAT_CHECKER.check(text, name)


HONOURED = [  # a schema, texts that follow it and texts that do not; each is a trap of xgrammar's
    ({"type": "string", "maxLength": 2}, ['"👋👋"'], ['"abc"', '"\t"', '"\\n"']),
    ({"pattern": 'a"\\\\'}, [r'"a\"\\"'], [r'"a"\"', '"a"']),
    ({"type": "array", "minItems": 1}, ["[1]", '["a",{}]'], ["[]"]),
    ({"type": "object", "required": ["a"]}, ['{"a":1}'], ["{}", '{"b":1}']),
    ({"required": ["b"], "properties": {"a": {"type": "null"}}}, ['{"b":1}'], ['{"a":null}']),
    ({"properties": {"größe": {"const": 1}}, "required": ["größe"]}, ['{"größe":1}'], ['{"gröse":1}']),
    (
        {"properties": {"a": {"type": "null"}}, "additionalProperties": {"type": "integer"}},
        ['{"a":null}', '{"b":1}', '{"a":null,"aa":1}'],
        ['{"a":1}', r'{"\u0061":1}', '{"b":null}'],
    ),
    ({"type": "integer", "enum": [1, "1", 2.0, 2.5]}, ["1", "2"], ['"1"', "2.5"]),
    ({"type": "integer", "exclusiveMinimum": 0.5, "maximum": 2.5}, ["1", "2"], ["0", "3"]),
    ({"oneOf": [{"type": "null"}, {"enum": ["a"]}]}, ["null", '"a"'], ["1"]),
    ({"items": [{"type": "null"}], "additionalItems": False}, ["[]", "[null]"], ["[1]", "[null,1]"]),
    ({"propertyNames": {"enum": ["a", 1]}, "additionalProperties": {"const": 2}}, ['{"a":2}'], ['{"b":2}', "{1:2}"]),
    ({"$ref": "#/x/0/a~1b", "x": [{"a/b": {"const": 3}}]}, ["3"], ["4"]),
    ({"title": "any"}, ["1", '{"a":[]}'], ["x"]),
]


@pytest.mark.parametrize(("schema", "good", "bad"), HONOURED)
def test_what_a_schema_says_holds(models, schema, good, bad):
    structure = {"json": schema, "disable_any_whitespace": True}
    for text in good:
        assert models("byte_level").accepts(text, **structure), text
    for text in bad:
        assert not models("byte_level").accepts(text, **structure), text


REFUSED = [
    ({"json": "{"}, "no JSON"),
    ({"json": "[]"}, r"a schema must be an object, true or false, got \[\]"),
    ({"json": "false"}, "allows nothing"),
    ({"json": "[" * 100_000}, "no JSON"),
    ({"json": {"type": "number", "multipleOf": 2}}, "'multipleOf' is supported for integers only"),
    ({"json": {"type": "integer", "multipleOf": 3, "minimum": 0}}, "'multipleOf' of 3 is not supported"),
    ({"json": {"type": "array", "uniqueItems": True}}, "'uniqueItems' is not supported"),
    ({"json": {"type": "array", "contains": {}}}, "'contains' is not supported"),
    ({"json": {"properties": {"a": {"not": {}}}}}, r"'not' is not supported \(at #/properties/a\)"),
    (
        {"json": {"type": "object", "patternProperties": {"a": {}, "b": {}}}},
        "'patternProperties' is supported with one",
    ),
    ({"json": {"type": "object", "minProperties": 2}}, "'minProperties' of 2 is not supported"),
    ({"json": {"oneOf": [{}, {"type": "null"}]}}, "'oneOf' is not supported where two may hold"),
    ({"json": {"oneOf": [{"enum": [1]}, {"const": 1.0}]}}, "'oneOf' is not supported where two may hold"),
    ({"json": {"allOf": [{}, {}]}}, "'allOf' of more than one schema"),
    ({"json": {"anyOf": [{"required": ["a"]}], "properties": {}}}, "'anyOf' beside 'properties' is not supported"),
    ({"json": {"type": "any"}}, "'type' must be one or some of .*, got 'any'"),
    ({"json": {"type": "integer", "enum": ["a"]}}, "allows nothing"),
    ({"json": {"const": 2**70}}, "the constant 1180591620717411303424 is not supported"),
    ({"json": {"$ref": "#/$defs/x"}}, "'#/\\$defs/x' points to nothing"),
    ({"json": {"$ref": "other.json"}}, "must begin with '#/'"),
    ({"json": {"$ref": "#"}}, "Circular"),
    ({"json": {"type": "string", "format": "color"}}, "'format' of 'color' is not supported; there are date, time"),
    ({"json": {"type": "string", "pattern": "a", "maxLength": 2}}, "'pattern' beside 'maxLength' is not supported"),
    (
        {"json": {"type": "string", "minLength": 3, "maxLength": 2}},
        "'minLength' of 3 is greater than 'maxLength' of 2",
    ),
    ({"json": {"type": "string", "maxLength": 1.5}}, "'maxLength' must be an integer between 0 and"),
    ({"json": {"pattern": "("}}, "missing \\), unterminated subpattern"),
    ({"regex": "a("}, "missing \\), unterminated subpattern"),
    ({"regex": "(?i)a"}, "flags re.IGNORECASE are not supported"),
    ({"regex": r"(a)\1"}, "a back-reference is not supported"),
    ({"regex": "a(?=b)"}, "a look-ahead or look-behind is not supported"),
    ({"regex": r"\bfoo"}, "a word boundary .* is not supported"),
    ({"regex": "a^b"}, r"\^ and \$ are supported at its start and its end only"),
    ({"regex": "(a{100}){100}"}, "more than 2000 characters"),
    ({"regex": "(a?){1500}"}, "too many ways"),
    ({"regex": "(" * 20_000}, "nested too deeply"),
    ({"choice": ["a" * 200_000]}, "at most 200000 characters, got 200004"),
    ({"grammar": "root ::= x"}, 'Rule "x" is not defined'),
    ({"grammar": "start 'a'"}, "Lark"),
]


@pytest.mark.parametrize(("structure", "match"), REFUSED)
def test_what_cannot_be_honoured_is_refused(model, structure, match):
    with pytest.raises(ValueError, match=f"(?s)structured_outputs cannot be used: .*{match}"):
        model.compiler.validate(StructuredOutputsParams(**structure))


# ---- expressions, choices and grammars ----------------------------------------------------------------------------

CHARACTERS = [*'ab1 -_é中👋"/@ß', r"\\", r"\.", r"\n", r"\^", "\u07ff", "\u0800", "\uffff", "\U00010000"]
MEMBERS = [
    "a-z",
    "0-9",
    "é-ü",
    "一-龥",
    r"\d",
    r"\w",
    r"\s",
    r"\W",
    r"\S",
    r"\D",
    '"',
    r"\\",
    r"\n",
    "\u0700-\U00010400",
]


def loaded(text: str | None) -> object:
    return None if text is None else json.loads(text)


def random_expression(rng: random.Random, depth: int) -> str:
    kind = rng.random()
    if depth == 0 or kind < 0.35:
        members = "".join(rng.sample(MEMBERS, rng.randint(1, 3)))
        return rng.choice([*CHARACTERS, f"[{members}]", f"[^{members}]", ".", r"\w", r"\S"])
    if kind < 0.6:
        return "".join(random_expression(rng, depth - 1) for _ in range(rng.randint(1, 3)))
    if kind < 0.75:
        return f"({'|'.join(random_expression(rng, depth - 1) for _ in range(3))}{rng.choice(['', '|'])})"
    counts = ["?", "*", "+", "{2}", "{1,3}", "{0,2}", "{2,}", "*?"]
    if rng.random() < 0.3:
        return rng.choice(CHARACTERS) + rng.choice(["{130}", "{0,200}"])
    return f"(?:{random_expression(rng, depth - 1)}){rng.choice(counts)}"


def check_expressions(model: Model, seeds: range) -> None:
    num_checked = 0
    for seed in seeds:
        rng = random.Random(seed)
        expression = random_expression(rng, 3)
        try:
            texts = [model.text(rng, regex=expression)]
            texts.append(loaded(model.text(rng, json={"type": "string", "pattern": f"^({expression})$"})))
        except ValueError as error:  # as of a group of "é中" that is negated
            assert "matches nothing" in str(error)
            continue
        for text in texts:
            num_checked += text is not None
            assert text is None or re.fullmatch(expression, text), (
                f"seed {seed}: {text!r} does not match {expression!r}"
            )
    assert num_checked > 1.7 * len(seeds)


def test_texts_match_their_expression(models):
    check_expressions(models("byte_level"), range(25))


@pytest.mark.slow
def test_texts_match_thousands_of_expressions(models):
    check_expressions(models("byte_level"), range(1000, 4000))


EXACT = ["(ba{1,3})?", "b|b{1,3}", "a*ab", "((a|ab)(b|))*", "(a?){0,3}b", "^a|b$", "(^(a|b)$)", "a{2,}|b?a", "[^a]+|"]


@pytest.mark.parametrize("expression", EXACT)
def test_expressions_mean_the_same_as_for_python(models, expression):
    for text in ("".join(signs) for length in range(5) for signs in itertools.product("ab", repeat=length)):
        assert models("byte_level").accepts(text, regex=expression) == bool(re.fullmatch(expression, text)), text


def test_choices_are_texts_as_they_stand(model):
    choices = ["yes", "no", 'say "hi"\n\\', "größer 👋", "a|b", "yes, but", "ße\x00\x7f1"]
    rng = random.Random(0)
    assert {model.text(rng, choice=choices) for _ in range(80)} == set(choices)


GRAMMARS = [
    'root ::= term (("+" | "-") term)*\nterm ::= [0-9]+ | "(" root ")"',
    'start: term (("+" | "-") term)*\nterm: /[0-9]+/ | "(" start ")"',  # Lark's dialect
]


@pytest.mark.parametrize("grammar", GRAMMARS)
def test_grammars(models, grammar):
    texts = ("1", "12+(3-4)", "((5))", "", "(1", "1+", "a")
    accepted = [text for text in texts if models("byte_level").accepts(text, grammar=grammar)]
    assert accepted == ["1", "12+(3-4)", "((5))"]


def test_any_object(models):
    texts = ("{}", '{"a": [1, null]}', '{ "a":{}}', "[]", "1", '{"a"}', " {}", "{} ")
    assert [text for text in texts if models("byte_level").accepts(text, json_object=True)] == list(texts[:3])


# ---- tokens and constraints ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["byte_level", "metaspace_bpe", "gemma_bpe", "unigram_uncleaned"])
def test_tokens_are_the_bytes_that_they_are_decoded_to(models, kind):
    tokenizer, rng = models(kind).tokenizer, random.Random(0)
    tokens = token_bytes(tokenizer, 1000)
    words = [token_id for token_id, token in enumerate(tokens) if token]
    assert len(words) > 40 and not any(tokens[tokenizer.backend.get_vocab_size() :])
    for _ in range(50):
        token_ids = rng.choices(words, k=5)
        text = b"".join(tokens[token_id] for token_id in token_ids)
        try:
            text = text.decode()
        except UnicodeDecodeError:
            continue
        assert tokenizer.decode(token_ids) in (text, text.removeprefix(" "))


@pytest.mark.parametrize("kind", ["word_piece", "unigram"])
def test_tokens_whose_text_depends_on_others_are_refused(tmp_path, kind):
    KINDS[kind](tmp_path)
    with pytest.raises(ValueError, match="structured_outputs cannot be used with this model's tokenizer"):
        GrammarCompiler(load_tokenizer(str(tmp_path)), 100, [2]).validate(StructuredOutputsParams(regex="a"))


def test_the_end_is_allowed_where_the_grammar_ends_only(models):
    model = models("byte_level")
    constraint = model.constraint(regex="aa?")
    a = model.tokenizer.encode("a")[0]
    for allowed in ([a], [a, model.eos], [model.eos]):
        assert set(np.flatnonzero(model.allowed(constraint))) == set(allowed)
        assert not constraint.is_finished
        constraint.accept(allowed[0])
    assert constraint.is_finished


def test_tokens_that_are_not_decoded_are_never_allowed(models):
    model = models("byte_level")
    allowed = model.allowed(model.constraint(regex=r"(.|\n|\r)*"))
    special = [model.tokenizer.backend.token_to_id(text) for text in ("<unk>", "<s>")]
    assert allowed[model.eos] and allowed.sum() > 100
    assert not allowed[special].any() and not allowed[model.tokenizer.backend.get_vocab_size() :].any()


def test_without_an_end_token_a_text_ends_where_nothing_may_follow(tmp_path):
    KINDS["byte_level"](tmp_path)
    model = Model(str(tmp_path), has_end=False)
    constraint = model.constraint(regex="aa?")
    ends = []
    for _ in range(2):
        constraint.accept(model.tokenizer.encode("a")[0])
        ends.append(constraint.is_finished)
    assert ends == [False, True]


def test_what_is_not_allowed_is_not_accepted(models):
    constraint = models("byte_level").constraint(choice=["a"])
    with pytest.raises(RuntimeError, match="does not allow token"):
        constraint.accept(models("byte_level").tokenizer.encode("b")[0])


def test_bad_words_are_banned_behind_their_first_tokens():
    rng, vocab_size = random.Random(0), 70
    words = [[rng.randrange(vocab_size) for _ in range(rng.randint(2, 3))] for _ in range(40)]
    words += [[31, 31], [0, 31], [63]]
    constraint, generated = BadWords(words), []
    mask = np.zeros(3, dtype=np.int32)
    for _ in range(300):
        constraint.fill_mask(mask)
        banned = {
            word[-1]
            for word in words
            if generated[max(0, len(generated) - len(word) + 1) :] == word[:-1] or not word[:-1]
        }
        bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
        assert set(np.flatnonzero(bits[:vocab_size] == 0)) == banned
        generated.append(rng.randrange(vocab_size))
        constraint.accept(generated[-1])


def test_a_grammar_and_bad_words_hold_both(models):
    model = models("byte_level")
    a, b = (model.tokenizer.encode(text)[0] for text in "ab")
    grammar = model.compiler.compile(StructuredOutputsParams(regex="[ab]{2}")).result()
    constraint = make_constraint(grammar, [(a, b), (b,)])
    constraint.accept(a)
    assert set(np.flatnonzero(model.allowed(constraint))) == {a}
    assert make_constraint(None, [(b,)]) is None
    assert set(np.flatnonzero(~model.allowed(make_constraint(None, [(a, b)])))) == set()


def test_a_structure_is_read_where_nobody_waits(model, monkeypatch):
    """It may take seconds, as may the first one's import; and an AsyncLLM's engine has not validated it."""
    readers = []

    def recorded(function: Callable) -> Callable:
        return lambda *arguments: (readers.append((function, threading.current_thread())), function(*arguments))[1]

    monkeypatch.setattr(compiler, "token_bytes", recorded(token_bytes))
    monkeypatch.setattr(compiler, "regex_rules", recorded(compiler.regex_rules))
    grammar = GrammarCompiler(model.tokenizer, model.vocab_size, [model.eos]).compile(
        StructuredOutputsParams(regex="[ab]{2}")
    )
    assert make_constraint(grammar.result(), []) is not None
    functions, threads = zip(*readers, strict=True)
    assert len(functions) == 2 and threading.current_thread() not in threads


def test_equal_grammars_are_compiled_once(model):
    first, second = (model.constraint(json=json.dumps(PERSON)) for _ in range(2))
    size = model.compiler.compiler.get_cache_size_bytes()
    third = model.constraint(json=PERSON)
    assert size == model.compiler.compiler.get_cache_size_bytes() > 0
    first.accept(model.tokenizer.encode("{")[0])
    assert (model.allowed(first) != model.allowed(second)).any()  # each has a state of its own
    assert (model.allowed(third) == model.allowed(second)).all()


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
    def answer(**options):
        params = SamplingParams(temperature=0, max_tokens=30, **options)
        return llm.chat([{"role": "user", "content": "What is a block table?"}], params, use_tqdm=False)[0].text

    # Of as many tokens behind a space as alone: otherwise the latter are banned only.
    for word in ("sequence", "in the order"):
        assert word in answer()
        assert word not in answer(bad_words=[word])


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
    with pytest.raises(ValueError, match="structured_outputs cannot be used: 'uniqueItems' is not supported"):
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
