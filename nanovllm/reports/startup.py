"""What an engine prints when it has started: what it computes, by what means, and in how much memory."""

import sys

from nanovllm.config import Config
from nanovllm.sampling.defaults import SamplingDefaults


def print_startup(config: Config, weights: str, num_blocks: int, defaults: SamplingDefaults) -> None:
    """Says on stderr what was chosen for the user; `weights` is how they are stored, "" if plainly."""
    weights = f" weights by {weights};" if weights else ""
    print(
        f"nano-vllm: {config.model_config.architecture} in {config.dtype} ({config.dtype_reason})",
        f"on {config.num_ranks} x {config.device};{weights}",
        f"attention by {config.attention_backend} ({config.attention_reason});",
        f"KV cache of num_kvcache_blocks={num_blocks} x {config.kvcache_block_size} tokens in",
        f"{config.kv_cache_dtype}; max_model_len={config.max_model_len}",
        file=sys.stderr,
    )
    if defaults.taken:
        print(f"nano-vllm: default sampling parameters of {defaults.path}: {defaults.taken}", file=sys.stderr)
