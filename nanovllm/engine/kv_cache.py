"""The memory of the KV cache: how many blocks fit, allocating them, and handing each attention layer its part.

Which block holds whose tokens is the block manager's business, on the host; what is stored in them, the layers'.
"""

import numpy as np
import torch
from torch import nn

from nanovllm.config import MAX_SLOTS, Config
from nanovllm.layers.attention import Attention
from nanovllm.parallel.tensor_parallel import TensorParallel

CPU_KVCACHE_BYTES = 4 * 2**30
MAX_BLOCKS = 2**20  # each has a record on the host; only toy models could have more


def bind_kv_cache(model: nn.Module, config: Config, tp: TensorParallel, num_blocks: int) -> int:
    """Allocates a cache of zeros in place of the one before, and hands each layer its part. Returns the bytes."""
    facts, dtype = config.model_config, config.torch_kv_cache_dtype
    num_kv_heads = max(facts.num_key_value_heads // tp.size, 1)
    block_shape = (config.kvcache_block_size, num_kv_heads, facts.head_dim)
    shape = (2, facts.num_hidden_layers, num_blocks, *block_shape)  # keys and values
    layers = [module for module in model.modules() if isinstance(module, Attention)]
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


def num_fitting_blocks_on_cpu(config: Config, block_bytes: int) -> int:
    """Blocks for as many of the longest sequences as may run, within CPU_KVCACHE_BYTES, but for one in any case."""
    num_useful = config.max_blocks_per_seq * config.max_num_seqs
    return max(config.max_blocks_per_seq, min(num_useful, CPU_KVCACHE_BYTES // block_bytes))


def num_fitting_blocks_on_gpu(config: Config, device: torch.device, block_bytes: int, step_bytes: int) -> int:
    """Blocks that fit into what the engine may take of a GPU, less what is taken and `step_bytes`, a step's peak."""
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    taken_bytes = total_bytes - free_bytes
    return (int(total_bytes * config.gpu_memory_utilization) - taken_bytes - step_bytes) // block_bytes


def choose_num_blocks(config: Config, tp: TensorParallel, num_fitting: int) -> int:
    """The number of blocks, alike on all ranks: the option's, or else as many as fit on each of them.

    Lowers max_model_len to what they hold if that may be lowered.

    Raises:
        ValueError: a request of max_model_len tokens does not fit.
    """
    num_blocks, option = config.num_kvcache_blocks, "num_kvcache_blocks"
    if num_blocks == -1:
        num_blocks = tp.min(min(num_fitting, MAX_SLOTS // config.kvcache_block_size, MAX_BLOCKS))
        option = "gpu_memory_utilization"
    if config.lowers_max_model_len and num_blocks > 0:
        config.max_model_len = min(config.max_model_len, num_blocks * config.kvcache_block_size)
    num_needed = config.max_blocks_per_seq
    if num_blocks < num_needed:
        raise ValueError(
            f"max_model_len={config.max_model_len} needs {num_needed} blocks of the KV cache, which has "
            f"{max(num_blocks, 0)}; lower max_model_len, or raise {option}"
        )
    return num_blocks
