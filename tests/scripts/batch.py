"""One call with prompts of all forms, each with parameters of its own."""

import sys

from shapes import report
from vllm import LLM, SamplingParams, TextPrompt, TokensPrompt

TEXT = "The KV cache is paged, so that"


def main(model):
    llm = LLM(model=model, max_model_len=512, seed=0)
    tokenizer = llm.get_tokenizer()
    ids = tokenizer.encode(TEXT)
    comma, dot = (tokenizer.encode(mark, add_special_tokens=False)[-1] for mark in ",.")

    fixed = {"max_tokens": 8, "ignore_eos": True}
    requests = {
        "greedy": (TEXT, SamplingParams(temperature=0, **fixed)),
        "filtered": (ids, SamplingParams(temperature=0.9, top_k=20, top_p=0.9, min_p=0.02, **fixed)),
        "seeded": ({"prompt": TEXT}, SamplingParams(seed=17, **fixed)),
        "seeded again": ({"prompt_token_ids": ids}, SamplingParams(seed=17, **fixed)),
        "varied": (TEXT, SamplingParams(presence_penalty=0.5, repetition_penalty=1.3, **fixed)),
        "biased": (TokensPrompt(prompt_token_ids=ids), SamplingParams(logit_bias={dot: 100.0}, **fixed)),
        "allowed": (TEXT, SamplingParams(temperature=0, allowed_token_ids=[comma, dot], **fixed)),
        "penalised": (
            TextPrompt(prompt=TEXT),
            SamplingParams(temperature=0, allowed_token_ids=[comma, dot], frequency_penalty=2.0, **fixed),
        ),
        "banned": (TEXT, SamplingParams(allowed_token_ids=[comma, dot], bad_words=["."], **fixed)),
        "stopped": (TEXT, SamplingParams(allowed_token_ids=[comma], stop=[",,,"], max_tokens=8)),
        "stopped behind": (
            TEXT,
            SamplingParams(allowed_token_ids=[comma], stop=",,,", include_stop_str_in_output=True, max_tokens=8),
        ),
        "stopped by id": (ids, SamplingParams(logit_bias={dot: 100.0}, stop_token_ids=[dot], max_tokens=8)),
        "stopped late": (
            TEXT,
            SamplingParams(logit_bias={dot: 100.0}, stop_token_ids=[dot], min_tokens=3, max_tokens=8),
        ),
        "without text": (TEXT, SamplingParams(detokenize=False, **fixed)),
    }
    prompts = [prompt for prompt, _ in requests.values()]
    params = [params for _, params in requests.values()]
    outputs = dict(zip(requests, llm.generate(prompts, params), strict=True))
    for name, output in outputs.items():
        completion = output.outputs[0]
        print(f"{name}: {completion.text!r} ({completion.finish_reason}, {completion.stop_reason!r})")
    return {"outputs": outputs, "ids": ids, "comma": comma, "dot": dot}


if __name__ == "__main__":
    results = main(sys.argv[1])
    report(results)
