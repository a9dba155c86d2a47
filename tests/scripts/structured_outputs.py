"""Texts of a given form: a choice, a regular expression, JSON by a schema or of any kind, a grammar."""

import sys
from enum import Enum

from pydantic import BaseModel, Field
from shapes import report
from vllm import LLM, SamplingParams
from vllm.sampling_params import StructuredOutputsParams


class Priority(str, Enum):
    LOW = "low"
    HIGH = "high"


class Ticket(BaseModel):
    title: str = Field(max_length=12)
    priority: Priority
    is_open: bool
    votes: int = Field(ge=0, le=99)


POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 9}, "on": {"type": "boolean"}},
    "required": ["x", "on"],
    "additionalProperties": False,
}
SUMS = """
root ::= number " + " number " = " number
number ::= digit | digit digit
digit ::= [0-9]
"""
FORMS = {
    "choice": StructuredOutputsParams(choice=["positive", "negative"]),
    "regex": StructuredOutputsParams(regex=r"[a-z]{2,8}@[a-z]{2,8}\.(com|org)"),
    "schema": StructuredOutputsParams(json=POINT, disable_any_whitespace=True),
    "class": StructuredOutputsParams(json=Ticket.model_json_schema(), disable_any_whitespace=True),
    "grammar": StructuredOutputsParams(grammar=SUMS),
    "any object": StructuredOutputsParams(json_object=True, disable_any_whitespace=True),
}
PROMPTS = {
    "choice": "This engine is a joy to read. Is that positive or negative?",
    "regex": "Make up an address for Ada Lovelace:",
    "schema": "A point as JSON:",
    "class": "A ticket about a slow build as JSON:",
    "grammar": "A sum:",
    "any object": "Anything as JSON:",
}


def main(model):
    llm = LLM(model=model)
    params = [SamplingParams(temperature=0.7, max_tokens=100, structured_outputs=form) for form in FORMS.values()]
    outputs = llm.generate([PROMPTS[name] for name in FORMS], params)
    texts, finish_reasons = {}, {}
    for name, output in zip(FORMS, outputs, strict=True):
        texts[name] = output.outputs[0].text
        finish_reasons[name] = output.outputs[0].finish_reason
        print(f"{name}: {texts[name]}")
    return {"texts": texts, "finish_reasons": finish_reasons}


if __name__ == "__main__":
    results = main(sys.argv[1])
    report(results)
