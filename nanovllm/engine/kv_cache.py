"""The memory of the KV cache: allocating it, and handing each attention layer its part.

How many blocks fit is found out in memory/; which of them holds whose tokens is the block manager's business, on the
host; what is stored in them, the layers'.
"""

import numpy as np
import torch
from torch import nn

from nanovllm.config import Config
from nanovllm.layers.attention import Attention
from nanovllm.parallel.tensor_parallel import TensorParallel


def bind_kv_cache(model: nn.Module, config: Config, tp: TensorParallel, num_blocks: int) -> int:
    """Allocates a cache of zeros in place of the one before, and hands each layer its part. Returns the bytes."""
    facts, dtype = config.model_config, config.torch_kv_cache_dtype
    num_kv_heads = max(facts.num_key_value_heads // tp.size, 1)
    block_shape = (config.kvcache_block_size, num_kv_heads, facts.head_dim)
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    shape = (2, len(layers), num_blocks, *block_shape)  # keys and values
    for layer in layers:  # frees the cache before
        layer.k_cache = layer.v_cache = torch.empty(0)
    if tp.device.type == "cpu":  # NumPy's zeros take no memory until they are written
        bytes_shape = (*shape[:-1], facts.head_dim * dtype.itemsize)
        caches = torch.from_numpy(np.zeros(bytes_shape, np.uint8)).view(dtype)
    else:
        caches = torch.zeros(shape, dtype=dtype, device=tp.device)
    semaphores = torch.zeros(config.max_num_decodes * num_kv_heads, dtype=torch.int32, device=tp.device)
    k_caches, v_caches = caches
    for layer, k_cache, v_cache in zip(layers, k_caches, v_caches, strict=True):
        layer.k_cache, layer.v_cache, layer.semaphores = k_cache, v_cache, semaphores
    return caches.nbytes
