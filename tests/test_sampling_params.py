"""Each request option is taken, refused or brought to its one form by itself, and beside the others."""

import copy
import pickle
from dataclasses import fields

import pytest

from nanovllm.sampling.adjustments import adjusts_logits, has_penalties
from nanovllm.sampling_params import (
    BeamSearchParams,
    GuidedDecodingParams,
    RequestOutputKind,
    SamplingParams,
    StructuredOutputsParams,
)

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}

# a value that differs from the default, for every option that can be set
VALUES = {
    "temperature": 0.5,
    "top_k": 5,
    "top_p": 0.9,
    "min_p": 0.1,
    "max_tokens": None,
    "ignore_eos": True,
    "seed": 3,
    "stop": ("a", "b"),
    "stop_token_ids": (1, 2),
    "n": 2,
    "presence_penalty": -2,
    "frequency_penalty": 2.0,
    "repetition_penalty": 1.5,
    "min_tokens": 3,
    "logprobs": 5,
    "prompt_logprobs": -1,
    "logit_bias": {7: 1.5, 0: -100.0},
    "bad_words": ("bad", " word"),
    "allowed_token_ids": (0, 9),
    "include_stop_str_in_output": True,
    "skip_special_tokens": False,
    "spaces_between_special_tokens": False,
    "detokenize": False,
    "output_kind": RequestOutputKind.DELTA,
    "structured_outputs": StructuredOutputsParams(json=SCHEMA),
    "truncate_prompt_tokens": -1,
}


@pytest.mark.parametrize("name", VALUES)
def test_each_option_is_kept_shown_compared_and_copied(name):
    value = VALUES[name]
    params = SamplingParams(**{name: value})
    assert getattr(params, name) == value
    assert repr(params) == f"SamplingParams({name}={value!r})"
    assert params != SamplingParams()
    for other in (params.clone(), copy.copy(params), pickle.loads(pickle.dumps(params))):
        assert other == params and other is not params

    params.check()
    assert params == SamplingParams(**{name: value})
    assigned = SamplingParams()
    setattr(assigned, name, value)
    assigned.check()
    assert assigned == params


def test_the_order_and_the_defaults():
    names = [field.name for field in fields(SamplingParams)]
    refused = ["extra_args", "logits_processors", "best_of"]
    assert names == [*list(VALUES)[:-1], "guided_decoding", "truncate_prompt_tokens", *refused]
    params = SamplingParams()
    assert repr(params) == "SamplingParams()"
    assert (params.temperature, params.top_k, params.top_p, params.max_tokens) == (1.0, -1, 1.0, 64)
    assert (params.stop, params.stop_token_ids, params.bad_words) == ((), (), ())
    assert (params.allowed_token_ids, params.logit_bias, params.structured_outputs) == (None, None, None)


BAD = [
    ({"n": 0}, ValueError, "n must be.*1.*0"),
    ({"n": 2.0}, TypeError, r"n must be.*2\.0"),
    ({"n": 3, "temperature": 0}, ValueError, "n must be 1 when using greedy sampling.*3"),
    ({"presence_penalty": 2.1}, ValueError, r"presence_penalty.*-2 and 2.*2\.1"),
    ({"presence_penalty": "a"}, TypeError, "presence_penalty.*a"),
    ({"frequency_penalty": -2.1}, ValueError, r"frequency_penalty.*-2 and 2.*-2\.1"),
    ({"frequency_penalty": float("nan")}, ValueError, "frequency_penalty.*nan"),
    ({"repetition_penalty": 0}, ValueError, "repetition_penalty.*0"),
    ({"repetition_penalty": 1e-40}, ValueError, "repetition_penalty.*1e-40"),
    ({"repetition_penalty": float("inf")}, ValueError, "repetition_penalty.*inf"),
    ({"min_tokens": -1}, ValueError, "min_tokens.*0.*-1"),
    ({"min_tokens": 9, "max_tokens": 8}, ValueError, "min_tokens.*max_tokens=8.*9"),
    ({"logprobs": -2}, ValueError, "logprobs.*-1.*-2"),
    ({"logprobs": True}, TypeError, "logprobs.*True"),
    ({"prompt_logprobs": -2}, ValueError, "prompt_logprobs.*-1.*-2"),
    ({"prompt_logprobs": 1.0}, TypeError, r"prompt_logprobs.*1\.0"),
    ({"logit_bias": [(1, 2.0)]}, TypeError, "logit_bias.*dict.*1, 2"),
    ({"logit_bias": {"a": 1}}, TypeError, "token id of logit_bias.*'a'"),
    ({"logit_bias": {"-1": 1}}, TypeError, "token id of logit_bias.*'-1'"),
    ({"logit_bias": {-1: 1}}, ValueError, "token id of logit_bias.*-1"),
    ({"logit_bias": {True: 1}}, TypeError, "token id of logit_bias.*True"),
    ({"logit_bias": {5: "a"}}, TypeError, r"logit_bias\[5\].*'a'"),
    ({"logit_bias": {5: float("-inf")}}, ValueError, r"logit_bias\[5\].*-inf"),
    ({"logit_bias": {5: 1, "5": 2}}, ValueError, "logit_bias.*'5' twice"),
    ({"bad_words": "bad"}, TypeError, "bad_words must be a list.*bad"),
    ({"bad_words": ["a", ""]}, ValueError, "bad_words"),
    ({"bad_words": [7]}, TypeError, "bad_words.*7"),
    ({"bad_words": ["\ud800"]}, ValueError, r"bad_words.*surrogates.*\\ud800"),
    ({"stop": "a\udfff"}, ValueError, "stop.*surrogates"),
    ({"structured_outputs": {"regex": "\ud800"}}, ValueError, "regex.*surrogates"),
    ({"allowed_token_ids": []}, ValueError, "allowed_token_ids.*at least one"),
    ({"allowed_token_ids": [1, -1]}, ValueError, "allowed_token_ids.*-1"),
    ({"allowed_token_ids": ["1"]}, TypeError, "allowed_token_ids.*'1'"),
    ({"allowed_token_ids": 1}, TypeError, "allowed_token_ids must be a list.*1"),
    ({"detokenize": 0}, TypeError, "detokenize.*0"),
    ({"detokenize": False, "stop": "x"}, ValueError, "stop.*detokenize=False.*'x'"),
    ({"skip_special_tokens": None}, TypeError, "skip_special_tokens.*None"),
    ({"spaces_between_special_tokens": 1}, TypeError, "spaces_between_special_tokens.*1"),
    ({"include_stop_str_in_output": "no"}, TypeError, "include_stop_str_in_output.*no"),
    ({"output_kind": 1}, TypeError, "output_kind.*RequestOutputKind.*1"),
    ({"truncate_prompt_tokens": 0}, ValueError, "truncate_prompt_tokens.*-1 or at least 1.*0"),
    ({"truncate_prompt_tokens": -2}, ValueError, "truncate_prompt_tokens.*-2"),
    ({"extra_args": {"a": 1}}, ValueError, "extra_args.*'a'"),
    ({"extra_args": 7}, TypeError, "extra_args.*7"),
    ({"logits_processors": [abs]}, ValueError, "logits_processors.*CUDA graphs.*logit_bias.*structured_outputs.*abs"),
    ({"logits_processors": abs}, ValueError, "logits_processors.*CUDA graphs"),
    ({"best_of": 2}, ValueError, "best_of.*use n.*2"),
    ({"best_of": True}, TypeError, "best_of.*True"),
    ({"structured_outputs": "json"}, TypeError, "structured_outputs.*StructuredOutputsParams.*json"),
    ({"structured_outputs": {}}, ValueError, "one of json.*none"),
    ({"guided_decoding": SCHEMA}, TypeError, "GuidedDecodingParams.*type"),
    ({"guided_decoding": {"regex": "a"}, "structured_outputs": {"regex": "a"}}, ValueError, "guided.*both"),
    ({"use_beam_search": True}, TypeError, "SamplingParams.*use_beam_search"),
]


@pytest.mark.parametrize(("options", "error", "match"), BAD, ids=lambda value: str(value)[:40])
def test_what_is_refused_when_made_when_assigned_and_when_optional(options, error, match):
    with pytest.raises(error, match=match):
        SamplingParams(**options)
    if None not in options.values():
        with pytest.raises(error, match=match):
            SamplingParams.from_optional(**options)
    if "use_beam_search" not in options:
        params = SamplingParams()
        for name, value in options.items():
            setattr(params, name, value)
        with pytest.raises(error, match=match):
            params.check()


def test_an_option_that_there_is_not_cannot_be_assigned():
    with pytest.raises(AttributeError, match="max_token"):
        SamplingParams().max_token = 5


@pytest.mark.parametrize(
    "options",
    [
        {"n": 100},
        {"n": 1, "temperature": 0},
        {"presence_penalty": 2, "frequency_penalty": -2},
        {"repetition_penalty": 0.01},
        {"min_tokens": 8, "max_tokens": 8},
        {"min_tokens": 10**6, "max_tokens": None},
        {"logprobs": 0, "prompt_logprobs": 0},
        {"logit_bias": {}},
        {"detokenize": False, "stop": []},
        {"truncate_prompt_tokens": 1},
        {"extra_args": {}, "logits_processors": []},
        {"n": 3, "best_of": 3},
    ],
    ids=str,
)
def test_options_at_their_limits(options):
    params = SamplingParams(**options)
    assert all(getattr(params, name) in (value, ()) for name, value in options.items())


def test_one_form_of_what_can_be_written_in_several():
    params = SamplingParams(stop="x", stop_token_ids=[3], bad_words=["y"], allowed_token_ids=[4])
    assert (params.stop, params.stop_token_ids) == (("x",), (3,))
    assert (params.bad_words, params.allowed_token_ids) == (("y",), (4,))
    params.stop, params.bad_words, params.stop_token_ids = ["a", "b"], None, None
    params.check()
    assert (params.stop, params.bad_words, params.stop_token_ids) == (("a", "b"), (), ())

    bias = SamplingParams(logit_bias={"12": 1, 3: 10**400, 4: -101.5, "0": -100}).logit_bias
    assert bias == {12: 1.0, 3: 100.0, 4: -100.0, 0: -100.0}
    assert all(type(token_id) is int and type(number) is float for token_id, number in bias.items())


def test_a_clone_shares_nothing_that_can_change():
    schema = copy.deepcopy(SCHEMA)
    params = SamplingParams(logit_bias={1: 2.0}, structured_outputs=StructuredOutputsParams(json=schema))
    clone, before = params.clone(), pickle.loads(pickle.dumps(params))
    schema["properties"]["b"] = {}
    params.logit_bias[1] = 3.0
    params.structured_outputs.disable_any_whitespace = True
    params.temperature = 0.0
    assert clone == before and clone != params

    unchecked = SamplingParams()
    unchecked.stop = stop = ["a"]
    clone = unchecked.clone()
    stop.append("b")
    assert clone.stop == ["a"]


def test_from_optional():
    nothing = {field.name: None for field in fields(SamplingParams) if field.name != "max_tokens"}
    assert SamplingParams.from_optional(**nothing) == SamplingParams.from_optional() == SamplingParams()
    assert SamplingParams.from_optional(max_tokens=None).max_tokens is None
    assert SamplingParams.from_optional(n=2, logit_bias={"3": 500}) == SamplingParams(n=2, logit_bias={3: 100.0})
    with pytest.raises(TypeError, match="max_token"):
        SamplingParams.from_optional(max_token=5)


@pytest.mark.parametrize("name", VALUES)
def test_what_changes_the_logits(name):
    params = SamplingParams(**{name: VALUES[name]})
    penalties = {"presence_penalty", "frequency_penalty", "repetition_penalty"}
    others = {"min_tokens", "logit_bias", "bad_words", "allowed_token_ids", "structured_outputs"}
    assert has_penalties(params) is (name in penalties)
    assert adjusts_logits(params) is (name in penalties | others)
    assert params.is_filtered is (name in {"top_k", "top_p", "min_p"})
    params.temperature = 0
    assert not params.is_filtered


FORMS = {"json": SCHEMA, "regex": "[ab]+", "choice": ("yes", "no"), "grammar": 'root ::= "a"', "json_object": True}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("kind", [StructuredOutputsParams, GuidedDecodingParams])
def test_one_form_of_outputs(name, kind):
    form = {name: FORMS[name]}
    structure = kind(**form)
    assert getattr(structure, name) == FORMS[name]
    assert repr(structure) == f"{kind.__name__}({name}={FORMS[name]!r})"
    assert pickle.loads(pickle.dumps(structure)) == structure == structure.clone()
    for other in FORMS.keys() - {name}:
        with pytest.raises(ValueError, match=f"one of.*({name} and {other}|{other} and {name})"):
            kind(**form, **{other: FORMS[other]})

    older = kind is GuidedDecodingParams
    params = SamplingParams(**{"guided_decoding" if older else "structured_outputs": form})
    for _ in range(2):
        assert params.structured_outputs == structure and params.guided_decoding is None
        params.check()
    assert SamplingParams(guided_decoding=structure) == SamplingParams(structured_outputs=structure) == params
    params.guided_decoding = structure
    with pytest.raises(ValueError, match="both"):
        params.check()
    params.structured_outputs = None
    params.check()
    assert params.structured_outputs is structure


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({}, ValueError, "one of json, regex, choice, grammar, json_object.*none"),
        ({"json_object": False}, ValueError, "one of.*none"),
        ({"json_object": 1}, TypeError, "json_object.*1"),
        ({"json": [SCHEMA]}, TypeError, r"json must.*\[\{"),
        ({"json": int}, TypeError, "json must.*int"),
        ({"regex": 7}, TypeError, "regex.*7"),
        ({"regex": ""}, ValueError, "regex.*''"),
        ({"grammar": ["a"]}, TypeError, "grammar.*a"),
        ({"choice": "yes"}, TypeError, "choice must be a list.*yes"),
        ({"choice": []}, ValueError, "choice.*at least one"),
        ({"choice": ["a", 1]}, TypeError, "choice.*1"),
        ({"regex": "a", "structural_tag": "{}"}, ValueError, "structural_tag is not supported.*grammar.*'{}'"),
        ({"json": {}, "whitespace_pattern": " "}, ValueError, "whitespace_pattern is not supported.*regex.*' '"),
        ({"json": {}, "disable_fallback": True}, ValueError, "disable_fallback.*True"),
        ({"json": {}, "disable_any_whitespace": 1}, TypeError, "disable_any_whitespace.*1"),
        ({"json": {}, "disable_additional_properties": None}, TypeError, "disable_additional_properties.*None"),
        ({"regexp": "a"}, TypeError, "regexp"),
    ],
    ids=str,
)
def test_refused_structures(options, error, match):
    for kind in (StructuredOutputsParams, GuidedDecodingParams):
        with pytest.raises(error, match=match):
            kind(**options)
    with pytest.raises(error, match=match):
        SamplingParams(structured_outputs=options)


def test_a_structure_that_was_assigned_to_is_checked_with_the_parameters():
    params = SamplingParams(structured_outputs={"choice": ["a"]})
    params.structured_outputs.choice = ["b"]
    params.check()
    assert params.structured_outputs.choice == ("b",)
    params.structured_outputs.regex = "c"
    with pytest.raises(ValueError, match="choice"):
        params.check()


def test_the_backend_of_guided_decoding():
    for backend in (None, "auto", "xgrammar"):
        assert GuidedDecodingParams(regex="a", backend=backend).backend == backend
    with pytest.raises(ValueError, match=r"backend.*xgrammar.*outlines"):
        SamplingParams(guided_decoding={"regex": "a", "backend": "outlines"})
    with pytest.raises(TypeError, match="backend"):
        StructuredOutputsParams(regex="a", backend="auto")


def test_a_pydantic_class_becomes_its_schema():
    pydantic = pytest.importorskip("pydantic")
    model = pydantic.create_model("Point", x=(int, ...), name=(str, "a"))
    params = SamplingParams(structured_outputs=StructuredOutputsParams(json=model))
    assert params.structured_outputs.json == model.model_json_schema()
    assert pickle.loads(pickle.dumps(params)) == params == params.clone()
    with pytest.raises(TypeError, match="json must"):
        StructuredOutputsParams(json=model(x=1))


def test_an_empty_schema_is_a_form():
    assert StructuredOutputsParams(json={}).json == {}


def test_beam_search_params():
    params = BeamSearchParams(4, 16, length_penalty=-0.5)
    assert repr(params) == "BeamSearchParams(beam_width=4, max_tokens=16, length_penalty=-0.5)"
    assert pickle.loads(pickle.dumps(params)) == params == params.clone() != BeamSearchParams(4, 16)
    params.beam_width = 0
    with pytest.raises(ValueError, match=r"beam_width.*1.*0"):
        params.check()
    for options, error, match in (
        ({"max_tokens": 0}, ValueError, "max_tokens.*1.*0"),
        ({"max_tokens": None}, TypeError, "max_tokens.*None"),
        ({"temperature": -1}, ValueError, "temperature.*0.*-1"),
        ({"length_penalty": float("nan")}, ValueError, "length_penalty.*nan"),
        ({"ignore_eos": 1}, TypeError, "ignore_eos.*1"),
        ({"n": 2}, TypeError, "n"),
    ):
        with pytest.raises(error, match=match):
            BeamSearchParams(**{"beam_width": 2, "max_tokens": 8} | options)
