"""Text as it comes. This package's own way: vLLM's offline LLM has none."""

import sys

from shapes import report

from nanovllm import LLM, SamplingParams


def main(model):
    sampling_params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    prompt = "Streaming shows a text piece by piece"
    messages = [{"role": "user", "content": "introduce yourself"}]
    with LLM(model) as llm:
        texts = []
        for source in (prompt, messages):
            pieces = []
            for piece in llm.stream(source, sampling_params):
                print(piece, end="", flush=True)
                pieces.append(piece)
            print("\n")
            texts.append("".join(pieces))
        whole = llm.generate(prompt, sampling_params) + llm.chat(messages, sampling_params)
    return {"texts": texts, "whole": whole}


if __name__ == "__main__":
    results = main(sys.argv[1])
    report(results)
