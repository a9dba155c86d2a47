"""Texts of several requests as they come, by driving the engine."""

import sys

from shapes import report
from vllm import LLM, SamplingParams
from vllm.sampling_params import RequestOutputKind

PROMPTS = ["First come", "The second prompt is a little longer"]


def main(model):
    llm = LLM(model=model)
    options = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}
    engine = llm.llm_engine
    for number, prompt in enumerate(PROMPTS):
        engine.add_request(str(number), prompt, SamplingParams(output_kind=RequestOutputKind.DELTA, **options))
    texts, token_ids = [""] * len(PROMPTS), [[] for _ in PROMPTS]
    while engine.has_unfinished_requests():
        for output in engine.step():
            completion, number = output.outputs[0], int(output.request_id)
            print(f"{number}: {completion.text!r}")
            texts[number] += completion.text
            token_ids[number] += completion.token_ids
    whole = llm.generate(PROMPTS, SamplingParams(**options))
    return {"texts": texts, "token_ids": token_ids, "whole": whole}


if __name__ == "__main__":
    results = main(sys.argv[1])
    report(results)
