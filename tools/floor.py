"""The time that no engine could beat: what must be read and computed, at the speeds that this GPU reaches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # importing the package is among what bench.py measures
    from nanovllm.checkpoint.model_config import ModelConfig
    from tools.runs import Request


@dataclass(frozen=True)
class Floor:
    """The least time the requests could take, were the GPU busy with nothing but what cannot be avoided.

    A decode step reads all weights once (of the input embedding only a row a request, which is not counted) and each
    request's keys and values. A request of P prompt and N output tokens takes N - 1 decode steps with contexts of
    P + 1 to P + N - 1 tokens, and there are at least as many steps as the longest output takes. Prefill is bound by
    arithmetic: two FLOPs for each weight and token, four for each head element and pair of tokens that attend, and
    the head for last tokens only; a shared prefix is computed once. So

        seconds = ((kv_bytes + weight_bytes) / bandwidth + prefill_flops / flops_per_second) / number of GPUs

    with the bytes and FLOPs a second that one big read and one big matrix product reach on this device.
    """

    kv_bytes: int
    weight_bytes: int
    prefill_flops: int
    bandwidth: float
    flops_per_second: float
    seconds: float

    @classmethod
    def measure(cls, config: ModelConfig, dtype: str, requests: list[Request], prefix: int, num_gpus: int) -> Floor:
        """Counts the work of requests that share their first `prefix` tokens; measures the current device."""
        layer_weights, head_weights = count_weights(config)
        step_bytes, token_bytes = decode_bytes(config, dtype)
        lens = [(len(request.prompt), request.max_tokens) for request in requests]
        kv_bytes = token_bytes * sum((n - 1) * p + n * (n - 1) // 2 for p, n in lens)
        weight_bytes = step_bytes * (max(n for _, n in lens) - 1)
        num_prompt_tokens = sum(p for p, _ in lens)
        num_cached_tokens = prefix * (len(lens) - 1)
        attended_pairs = (sum(p * (p + 1) for p, _ in lens) - num_cached_tokens * (prefix + 1)) // 2
        prefill_flops = (
            2 * layer_weights * (num_prompt_tokens - num_cached_tokens)
            + 2 * head_weights * len(lens)
            + 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * attended_pairs
        )
        bandwidth, flops_per_second = measure_gpu(dtype)
        seconds = ((kv_bytes + weight_bytes) / bandwidth + prefill_flops / flops_per_second) / num_gpus
        return cls(kv_bytes, weight_bytes, prefill_flops, bandwidth, flops_per_second, seconds)


def count_weights(config: ModelConfig) -> tuple[int, int]:
    """Elements of all layers' matrices and of the head's; norms and biases are too small to count."""
    attention = 2 * (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    layer = config.hidden_size * (attention + 3 * config.intermediate_size)
    return config.num_hidden_layers * layer, config.hidden_size * config.vocab_size


def decode_bytes(config: ModelConfig, dtype: str) -> tuple[int, int]:
    """Bytes of weights that a decode step reads, and of one token's keys and values in all layers."""
    size = 4 if dtype == "float32" else 2
    kv_elements = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return size * sum(count_weights(config)), size * kv_elements


def measure_gpu(dtype: str) -> tuple[float, float]:
    """Bytes/s of a big read (the sum of 2 GiB) and FLOPs/s of a big matrix product."""
    import torch
    from torch.utils.benchmark import Timer

    data = torch.zeros(2**29, device="cuda")
    a, b = torch.randn(2, 8192, 8192, device="cuda").to(getattr(torch, dtype))  # zeros would run faster
    read, product = Timer("x.sum()", globals={"x": data}), Timer("a @ b", globals={"a": a, "b": b})
    return data.nbytes / read.timeit(100).mean, 2 * 8192**3 / product.timeit(100).mean
