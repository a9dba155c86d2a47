"""The likeliest texts that a beam search finds."""

import sys

from shapes import report
from vllm import LLM
from vllm.sampling_params import BeamSearchParams

PROMPTS = ["Continuous batching means", "A CUDA graph is"]


def main(model):
    llm = LLM(model=model)
    params = BeamSearchParams(beam_width=3, max_tokens=5, ignore_eos=True)
    outputs = llm.beam_search([{"prompt": prompt} for prompt in PROMPTS], params)
    for output in outputs:
        for sequence in output.sequences:
            print(f"{sequence.cum_logprob:8.3f}  {sequence.text!r}")
    return {"outputs": outputs}


if __name__ == "__main__":
    results = main(sys.argv[1])
    report(results)
