"""Prompts in, texts out."""

import sys

from shapes import report
from vllm import LLM, SamplingParams

PROMPTS = ["Once upon a time, a cache", "The three rules of scheduling are", "A token is"]


def main(model):
    llm = LLM(model=model)
    sampling_params = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=8, ignore_eos=True)
    outputs = llm.generate(PROMPTS, sampling_params)
    for output in outputs:
        print(f"Prompt: {output.prompt!r}")
        print(f"Text:   {output.outputs[0].text!r}\n")
    return {"outputs": outputs}


if __name__ == "__main__":
    results = main(sys.argv[1])
    report(results)
