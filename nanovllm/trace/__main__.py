"""Answers questions with the bundled demo, or another model, and prints what each step of the engine does."""

import argparse
import os

import nanovllm
from nanovllm import LLM, SamplingParams
from nanovllm.trace.recorder import Recorder
from nanovllm.trace.show import show_run

DEMO = os.path.join(os.path.dirname(nanovllm.__file__), "demo")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m nanovllm.trace", description=__doc__)
    parser.add_argument("questions", nargs="+", metavar="QUESTION")
    parser.add_argument("--model", default=DEMO, help="with a chat template (default: the bundled demo)")
    parser.add_argument("--max-tokens", type=int, default=256, help="of an answer")
    parser.add_argument("--block-size", type=int, default=16, help="of the KV cache")
    parser.add_argument("--num-blocks", type=int, default=64, help="of the KV cache")
    parser.add_argument("--max-num-batched-tokens", type=int, default=256, help="in one step")
    parser.add_argument("--json", help="write the run to this file too, for python -m nanovllm.timeline")
    args = parser.parse_args()
    with LLM(
        args.model,
        kvcache_block_size=args.block_size,
        num_kvcache_blocks=args.num_blocks,
        max_num_batched_tokens=args.max_num_batched_tokens,
        max_model_len="auto",
    ) as llm:
        recorder = Recorder(llm)
        conversations = [[{"role": "user", "content": question}] for question in args.questions]
        params = SamplingParams(temperature=0, max_tokens=args.max_tokens)
        results = llm.chat(conversations, params, use_tqdm=False)
        # As they are in the text: special tokens too.
        for line in show_run(recorder.run, lambda ids: llm.tokenizer.decode(ids, skip_special_tokens=False)):
            print(line)
    for question, result in zip(args.questions, results, strict=True):
        print(f"\nQuestion: {question}\nAnswer: {result['text']}")
    if args.json:
        recorder.save(args.json)


if __name__ == "__main__":
    main()
