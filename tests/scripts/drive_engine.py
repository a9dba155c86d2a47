"""The engine driven step by step: requests come while others run, and one is aborted."""

import sys

from shapes import report
from vllm import LLM, SamplingParams
from vllm.sampling_params import RequestOutputKind

REQUESTS = [
    ("Requests wait in a queue", SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=1)),
    ("A step computes", SamplingParams(temperature=0.8, top_k=5, max_tokens=6, ignore_eos=True)),
    ("Nobody will read", SamplingParams(max_tokens=100, ignore_eos=True)),
    ("Blocks go back", SamplingParams(n=2, max_tokens=8, ignore_eos=True, output_kind=RequestOutputKind.FINAL_ONLY)),
]


def main(model):
    engine = LLM(model=model).llm_engine
    waiting = list(enumerate(REQUESTS))
    finished = {}
    while waiting or engine.has_unfinished_requests():
        if waiting:
            number, (prompt, sampling_params) = waiting.pop(0)
            engine.add_request(f"request-{number}", prompt, sampling_params)
            if not waiting:
                engine.abort_request(["request-2"])
        for output in engine.step():
            if output.finished:
                finished[output.request_id] = output
                print(f"{output.request_id}: {[completion.text for completion in output.outputs]}")
    return {"finished": dict(sorted(finished.items()))}


if __name__ == "__main__":
    results = main(sys.argv[1])
    report(results)
