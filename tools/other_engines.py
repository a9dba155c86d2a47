"""Engines that ours is measured beside: vLLM, transformers and llama.cpp, driven as bench.py drives its own."""

from __future__ import annotations

import itertools
import os
import statistics
import time
from typing import Any

from tools.runs import Request, Run

HF_BATCH_SIZE = 32


def start_vllm(model: str, options: dict[str, Any]) -> Any:
    """vLLM's LLM, whose options are ours but for a prefix of their names."""
    from vllm import LLM

    return LLM(model, **{name.removeprefix("kvcache_"): value for name, value in options.items()})


def run_vllm(llm: Any, requests: list[Request], sampling: dict[str, Any]) -> Run:
    """Completes the requests in one call."""
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": r.prompt} for r in requests]
    params = [SamplingParams(max_tokens=r.max_tokens, ignore_eos=True, **sampling) for r in requests]
    start = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    total = sum(len(output.outputs[0].token_ids) for output in outputs)
    return Run(total, seconds, total / seconds)


def start_hf(model: str, options: dict[str, Any]) -> tuple[Any, Any]:
    """A model and its tokenizer. Without a dtype: bfloat16 on a GPU, float32 on a CPU, where that is faster."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if options["tensor_parallel_size"] > 1 or options.keys() - {"tensor_parallel_size", "load_format", "dtype"}:
        raise ValueError(f"--engine hf runs on one device and has no engine option but --dtype, got {options}")
    device, dtype = ("cuda", "bfloat16") if torch.cuda.is_available() else ("cpu", "float32")
    place = {"pretrained_model_name_or_path": model}
    if model.endswith(".gguf"):
        folder, file = os.path.split(model)
        place = {"pretrained_model_name_or_path": folder or ".", "gguf_file": file}
    if options.get("load_format") == "dummy":
        network = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    else:
        network = AutoModelForCausalLM.from_pretrained(**place)
    network.generation_config.eos_token_id = None  # what ignore_eos is elsewhere
    network.to(device, getattr(torch, options.get("dtype", dtype))).eval()
    return network, AutoTokenizer.from_pretrained(**place)


def run_hf(engine: tuple[Any, Any], requests: list[Request], sampling: dict[str, Any]) -> Run:
    """Batches padded on the left. What a request gets beyond its length, waiting for its batch, is not counted."""
    import torch

    network, tokenizer = engine
    is_greedy = sampling["temperature"] == 0
    how = {"do_sample": False} if is_greedy else sampling | {"do_sample": True, "top_k": max(0, sampling["top_k"])}
    total = 0
    start = time.perf_counter()
    for index in range(0, len(requests), HF_BATCH_SIZE):
        batch = requests[index : index + HF_BATCH_SIZE]
        width = max(len(r.prompt) for r in batch)
        length = max(r.max_tokens for r in batch)
        padded = torch.tensor([[-1] * (width - len(r.prompt)) + r.prompt for r in batch], device=network.device)
        how |= {"attention_mask": (padded >= 0).long(), "max_new_tokens": length, "pad_token_id": 0}
        rows = network.generate(padded.clamp(min=0), **how).tolist()
        outputs = [row[width : width + r.max_tokens] for row, r in zip(rows, batch, strict=True)]
        tokenizer.batch_decode(outputs)
        total += sum(map(len, outputs))
    seconds = time.perf_counter() - start
    return Run(total, seconds, total / seconds)


def start_llamacpp(model: str, options: dict[str, Any]) -> Any:
    """llama-cpp-python's Llama, which reads a GGUF file; on all threads that torch would take."""
    import torch
    from llama_cpp import Llama

    if not model.endswith(".gguf"):
        raise ValueError(f"--engine llamacpp needs --model to be a GGUF file, got {model!r}")
    if options["tensor_parallel_size"] > 1 or options.keys() - {"tensor_parallel_size", "max_model_len"}:
        raise ValueError(f"--engine llamacpp has no engine option but --max-model-len, got {options}")
    threads = torch.get_num_threads()
    context = options.get("max_model_len", 4096)
    return Llama(model, n_ctx=context, n_threads=threads, n_threads_batch=threads, verbose=False)


def run_llamacpp(llm: Any, requests: list[Request], sampling: dict[str, Any]) -> Run:
    """One request after the other, as the package has no batches."""
    how = {
        "temp": sampling["temperature"],
        "top_p": sampling["top_p"],
        "top_k": max(0, sampling["top_k"]),
        "min_p": 0.0,
    }
    total, firsts = 0, []
    start = time.perf_counter()
    for request in requests:
        tokens = []
        for token in itertools.islice(llm.generate(request.prompt, **how), request.max_tokens):
            if not tokens:
                firsts.append(time.perf_counter() - start)
            tokens.append(token)
        llm.detokenize(tokens)
        total += len(tokens)
    seconds = time.perf_counter() - start
    return Run(total, seconds, total / seconds, statistics.mean(firsts))
