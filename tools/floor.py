"""The time that no engine could beat: what must be read and computed, at the speeds that this GPU or CPU reaches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # importing the package is among what bench.py measures
    from nanovllm.checkpoint.model_config import ModelConfig
    from tools.runs import Request
    from tools.weight_format import WeightFormat


@dataclass(frozen=True)
class Floor:
    """The least time the requests could take, were the device busy with nothing but what cannot be avoided.

    A decode step reads all weights once (of the input embedding only a row a request, which is not counted) and each
    request's keys and values. Of experts it reads those that its requests are routed to: where all are equally likely,
    one of E is spared by B requests of K experts each with probability (1 - K / E) ** B. Quantised weights count with
    their scales and zeros; routers and the head are in the model's dtype. Where layers have a window, it reads the
    keys and values within. A request of P prompt and N output tokens takes N - 1 decode steps with
    contexts of P + 1 to P + N - 1 tokens; all requests begin at once, so that those with more than t output tokens are
    in step t. Prefill is bound by arithmetic: two FLOPs for each weight and token (of experts, its own), four for
    each head element and pair of tokens that attend, and the head for last tokens only; a shared prefix is computed
    once. So

        seconds = ((kv_bytes + weight_bytes) / bandwidth + prefill_flops / flops_per_second) / number of GPUs

    with the bytes and FLOPs a second that one big read and one big matrix product reach on this device. Where weights
    are multiplied in 8 bits, prefill_flops_in_8_bits are those of the quantised ones, at the FLOPs a second of a
    product of e4m3, and prefill_flops all others.
    """

    kv_bytes: int
    weight_bytes: int
    prefill_flops: int
    bandwidth: float
    flops_per_second: float
    seconds: float
    prefill_seconds: float  # of them, for prompts
    prefill_flops_in_8_bits: int = 0
    flops_per_second_in_8_bits: float | None = None  # None: nothing is multiplied so, or the device does not

    @classmethod
    def measure(
        cls,
        config: ModelConfig,
        dtype: str,
        requests: list[Request],
        prefix: int,
        num_gpus: int,
        kv_cache_dtype: str = "auto",
        quantized: WeightFormat | None = None,
    ) -> Floor:
        """Counts the work of requests that share their first `prefix` tokens; measures the current device."""
        cache_dtype = dtype if kv_cache_dtype == "auto" else kv_cache_dtype
        lens = [(len(request.prompt), request.max_tokens) for request in requests]
        kv_bytes = sum(cache_bytes(config, cache_dtype, range(p + 1, p + n)) for p, n in lens)
        longest = max(n for _, n in lens)
        weight_bytes = sum(
            step_bytes(config, dtype, batch, quantized) * steps
            for batch, steps in Counter(sum(n > step for _, n in lens) for step in range(1, longest)).items()
        )
        weights = count_weights(config)
        num_experts = config.mixture.num_experts_per_tok if config.mixture is not None else 0
        num_prompt_tokens = sum(p for p, _ in lens) - prefix * (len(lens) - 1)
        attended = sum(attended_pairs(config, p) for p, _ in lens) - (len(lens) - 1) * attended_pairs(config, prefix)
        head_elements = config.num_attention_heads * config.head_dim
        layer_flops = 2 * (weights.layers + num_experts * weights.expert) * num_prompt_tokens
        other_flops = (
            2 * weights.routers * num_prompt_tokens + 2 * weights.head * len(lens) + 4 * head_elements * attended
        )
        bandwidth, flops_per_second = measure_device(dtype)
        in_8_bits = measure_8_bit_product() if quantized is not None and quantized.in_8_bits else None
        prefill_seconds = other_flops / flops_per_second + layer_flops / (in_8_bits or flops_per_second)
        seconds = (kv_bytes + weight_bytes) / bandwidth + prefill_seconds
        return cls(
            kv_bytes,
            round(weight_bytes),
            other_flops if in_8_bits else other_flops + layer_flops,
            bandwidth,
            flops_per_second,
            seconds / num_gpus,
            prefill_seconds / num_gpus,
            layer_flops if in_8_bits else 0,
            in_8_bits,
        )


class NumWeights(NamedTuple):
    """Elements of a model's matrices: `expert` are those of one expert of each sparse layer, `layers` all others'.

    Norms and biases are too small to count.
    """

    layers: int
    expert: int
    routers: int
    head: int


def count_weights(config: ModelConfig) -> NumWeights:
    """Counts the weights of a model; the input embedding is left out."""
    mixture, num_layers = config.mixture, config.num_hidden_layers
    attention = 2 * (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    num_sparse = len(mixture.layers) if mixture is not None else 0
    layers = num_layers * attention + (num_layers - num_sparse) * 3 * config.intermediate_size
    expert = routers = 0
    if mixture is not None:
        layers += num_sparse * 3 * mixture.shared_intermediate_size
        expert = num_sparse * 3 * mixture.intermediate_size
        routers = num_sparse * mixture.num_experts
    return NumWeights(*(config.hidden_size * rows for rows in (layers, expert, routers, config.vocab_size)))


def step_bytes(config: ModelConfig, dtype: str, batch: int, quantized: WeightFormat | None = None) -> float:
    """Bytes of weights that a decode step of some requests reads, of experts as many as are expected to be needed."""
    weights = count_weights(config)
    num_read = 0.0
    if (mixture := config.mixture) is not None:
        share = mixture.num_experts_per_tok / mixture.num_experts
        num_read = mixture.num_experts * (1 - (1 - share) ** batch)
    layer_weights = weights.layers + num_read * weights.expert
    plain_bytes = element_bytes(dtype)
    layer_bytes = plain_bytes if quantized is None else quantized.bytes_per_weight(config.hidden_size)
    return layer_bytes * layer_weights + plain_bytes * (weights.routers + weights.head)


def cache_bytes(config: ModelConfig, dtype: str, contexts: Sequence[int]) -> int:
    """Bytes of the keys and values, in all layers, that queries with such contexts read, their own among them.

    `dtype` is the cache's.
    """
    seen = sum(
        num_layers * sum(min(context, window or context) for context in contexts)
        for window, num_layers in Counter(config.layer_windows).items()
    )
    return element_bytes(dtype) * 2 * config.num_key_value_heads * config.head_dim * seen


def attended_pairs(config: ModelConfig, length: int) -> int:
    """Pairs of a prompt's tokens that attend, in all layers."""
    pairs = 0
    for window in config.layer_windows:
        whole = min(length, window or length)  # tokens that see all before them
        pairs += whole * (whole + 1) // 2 + (length - whole) * whole
    return pairs


def element_bytes(dtype: str) -> int:
    """Bytes of an element."""
    if dtype.startswith("fp8"):
        return 1
    return 4 if dtype == "float32" else 2


def measure_device(dtype: str) -> tuple[float, float]:
    """Bytes/s of a big read (a sum) and FLOPs/s of a big matrix product, on the GPU, or on all cores of the CPU."""
    import torch
    from torch.utils.benchmark import Timer

    device, num_bytes, size, repeats = "cpu", 2**29, 2048, 5
    if torch.cuda.is_available():
        device, num_bytes, size, repeats = "cuda", 2**31, 8192, 100
    data = torch.zeros(num_bytes // 4, device=device)
    a, b = torch.randn(2, size, size, device=device).to(getattr(torch, dtype))  # zeros would run faster
    options = {"num_threads": torch.get_num_threads()}
    read = Timer("x.sum()", globals={"x": data}, **options)
    product = Timer("a @ b", globals={"a": a, "b": b}, **options)
    return data.nbytes / read.timeit(repeats).mean, 2 * size**3 / product.timeit(repeats).mean


def measure_8_bit_product() -> float | None:
    """FLOPs/s of a big product of e4m3, as fast as int8 where a GPU has both; None: it has none, or is a CPU."""
    import torch
    from torch.utils.benchmark import Timer

    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9):
        return None
    a, b = torch.randn(2, 8192, 8192, device="cuda").to(torch.float8_e4m3fn)
    names = {"torch": torch, "a": a, "b": b.t(), "one": torch.ones((), device="cuda")}
    product = Timer("torch._scaled_mm(a, b, one, one, out_dtype=torch.bfloat16, use_fast_accum=True)", globals=names)
    return 2 * 8192**3 / product.timeit(100).mean
