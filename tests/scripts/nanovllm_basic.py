"""As nano-vllm's scripts are: conversations that transformers renders, and results that are dicts."""

import sys

from shapes import report
from transformers import AutoTokenizer

from nanovllm import LLM, SamplingParams

QUESTIONS = ["introduce yourself", "list all prime numbers within 100"]


def main(model):
    tokenizer = AutoTokenizer.from_pretrained(model)
    llm = LLM(model, enforce_eager=True, tensor_parallel_size=1)
    sampling_params = SamplingParams(temperature=0.6, max_tokens=8)
    prompts = []
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        prompts.append(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    outputs = llm.generate(prompts, sampling_params)
    for prompt, output in zip(prompts, outputs, strict=True):
        print(f"Prompt: {prompt!r}")
        print(f"Completion: {output['text']!r}, {len(output['token_ids'])} tokens\n")
    return {"outputs": outputs}


if __name__ == "__main__":
    results = main(sys.argv[1])
    report(results)
