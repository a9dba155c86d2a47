"""Several texts for each prompt, and the likeliest of them."""

import sys

from shapes import report
from vllm import LLM, SamplingParams

PROMPTS = ["A scheduler decides", "The best thing about paging is"]


def main(model):
    llm = LLM(model=model)
    sampling_params = SamplingParams(n=4, temperature=0.9, seed=3, max_tokens=8, ignore_eos=True, logprobs=0)
    outputs = llm.generate(PROMPTS, sampling_params)
    best = []
    for output in outputs:
        print(f"Prompt: {output.prompt!r}")
        for completion in output.outputs:
            print(f"  {completion.index}: {completion.cumulative_logprob:8.3f}  {completion.text!r}")
        best.append(max(output.outputs, key=lambda completion: completion.cumulative_logprob))
        print(f"  best: {best[-1].index}")
    return {"outputs": outputs, "best": best}


if __name__ == "__main__":
    results = main(sys.argv[1])
    report(results)
