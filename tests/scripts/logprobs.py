"""How likely each token was, of the prompt and of the text."""

import math
import sys

from shapes import report
from vllm import LLM, SamplingParams

PROMPT = "Preemption gives the blocks of the newest sequence back"


def main(model):
    llm = LLM(model=model)
    sampling_params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=4, prompt_logprobs=1)
    outputs = llm.generate(PROMPT, sampling_params)
    output, completion = outputs[0], outputs[0].outputs[0]

    of_prompt = []
    for token_id, choices in zip(output.prompt_token_ids, output.prompt_logprobs, strict=True):
        if choices is not None:  # nothing comes before the first token
            chosen = choices[token_id]
            of_prompt.append(chosen.logprob)
            print(f"{chosen.decoded_token!r:>14} {chosen.logprob:8.3f}, rank {chosen.rank}")
    print(f"Perplexity of the prompt: {math.exp(-sum(of_prompt) / len(of_prompt)):.1f}\n")

    for token_id, choices in zip(completion.token_ids, completion.logprobs, strict=True):
        ranked = sorted(choices.values(), key=lambda choice: choice.rank)
        others = ", ".join(f"{choice.decoded_token!r} {choice.logprob:.2f}" for choice in ranked)
        print(f"{choices[token_id].decoded_token!r:>14} of {others}")
    print(f"Log probability of the text: {completion.cumulative_logprob:.3f}")
    return {"outputs": outputs}


if __name__ == "__main__":
    results = main(sys.argv[1])
    report(results)
