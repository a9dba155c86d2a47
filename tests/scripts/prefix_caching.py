"""Questions about one long text, whose KV is computed once."""

import sys

from shapes import report
from vllm import LLM, SamplingParams

RULES = "\n".join(f"Rule {number}: a block of tokens is shared by all whose prefix it is." for number in range(1, 21))
QUESTIONS = ["What is shared?", "How many rules are there?", "Who shares a block?"]


def main(model):
    llm = LLM(model=model, enable_prefix_caching=True, block_size=16, max_model_len=1024)
    sampling_params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    prompts = [f"{RULES}\n\nQuestion: {question}\nAnswer:" for question in QUESTIONS]

    cold = llm.generate(prompts[0], sampling_params)
    warm = llm.generate(prompts, sampling_params)
    llm.reset_prefix_cache()
    forgotten = llm.generate(prompts[0], sampling_params)
    for name, outputs in (("cold", cold), ("warm", warm), ("forgotten", forgotten)):
        for output in outputs:
            num_tokens = len(output.prompt_token_ids)
            print(f"{name}: {output.num_cached_tokens} of {num_tokens} tokens; {output.outputs[0].text!r}")
    return {"cold": cold, "warm": warm, "forgotten": forgotten}


if __name__ == "__main__":
    results = main(sys.argv[1])
    report(results)
