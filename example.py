"""Answers a few questions, with the bundled demo model or, as `--model`, a folder, GGUF file or hub name."""

from __future__ import annotations

import argparse
import os
import time

import nanovllm
from nanovllm import LLM, SamplingParams

DEMO = os.path.join(os.path.dirname(nanovllm.__file__), "demo")
QUESTIONS = [
    "introduce yourself",
    "list all prime numbers within 100",
    "What does offline inference mean?",
    "How do I generate text with nano-vllm?",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=DEMO, help="folder, GGUF file or hub name (default: the bundled demo)")
    model = parser.parse_args().model
    # The demo knows its answers by heart: temperature 0 always takes the likeliest token.
    sampling_params = SamplingParams(temperature=0.0 if model == DEMO else 0.6, max_tokens=256)

    with LLM(model) as llm:
        has_chat_template = bool(llm.get_tokenizer().chat_template)  # loading it is not to be timed
        start = time.perf_counter()
        if has_chat_template:
            conversations = [[{"role": "user", "content": question}] for question in QUESTIONS]
            results = llm.chat(conversations, sampling_params)
        else:
            results = llm.generate(QUESTIONS, sampling_params)
        seconds = time.perf_counter() - start

    for question, result in zip(QUESTIONS, results, strict=True):
        print(f"\nQuestion: {question}\nAnswer: {result['text']}")
    num_tokens = sum(len(result["token_ids"]) for result in results)
    print(f"\n{num_tokens} tokens in {seconds:.2f} s: {num_tokens / seconds:.0f} tok/s")


if __name__ == "__main__":
    main()
