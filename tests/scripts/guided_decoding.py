"""Texts of a given form, as scripts for vLLM before 0.12 ask for them."""

import sys

from shapes import report
from vllm import LLM, SamplingParams
from vllm.sampling_params import GuidedDecodingParams


def main(model):
    llm = LLM(model=model)
    guide = GuidedDecodingParams(choice=["yes", "no"])
    outputs = llm.generate("Is a prefix cached?", SamplingParams(temperature=0, guided_decoding=guide))
    text = outputs[0].outputs[0].text
    print(text)
    return {"text": text}


if __name__ == "__main__":
    results = main(sys.argv[1])
    report(results)
