"""As nano-vllm's benchmarks are: lists of token ids, each with parameters of its own."""

import random
import sys
import time

from shapes import report

from nanovllm import LLM, SamplingParams

NUM_SEQS = 8


def main(model):
    draws = random.Random(0)
    llm = LLM(model, enforce_eager=False, max_model_len=1024)
    prompt_token_ids = [[draws.randrange(1000) for _ in range(draws.randint(10, 60))] for _ in range(NUM_SEQS)]
    sampling_params = [
        SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=draws.randint(3, 8)) for _ in range(NUM_SEQS)
    ]
    llm.generate(["Warm-up: "], SamplingParams(max_tokens=2))
    start = time.time()
    outputs = llm.generate(prompt_token_ids, sampling_params, use_tqdm=False)
    seconds = time.time() - start
    total = sum(params.max_tokens for params in sampling_params)
    print(f"{total} tokens in {seconds:.2f} s: {total / seconds:.0f} tok/s")
    return {"outputs": outputs, "max_tokens": [params.max_tokens for params in sampling_params]}


if __name__ == "__main__":
    results = main(sys.argv[1])
    report(results)
