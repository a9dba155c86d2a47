"""The number of blocks of the KV cache: the option's, or as many as fit into memory."""

from collections.abc import Callable

import torch

from nanovllm.config import MAX_SLOTS, Config
from nanovllm.parallel.tensor_parallel import TensorParallel

CPU_KVCACHE_BYTES = 4 * 2**30
MAX_BLOCKS = 2**20  # each has a record on the host; only toy models could have more


def find_num_blocks(config: Config, tp: TensorParallel, block_bytes: int, measure_steps: Callable[[], int]) -> int:
    """The number of blocks, alike on all ranks; `measure_steps` gives the bytes of a GPU that steps take.

    Raises:
        ValueError: a request of max_model_len tokens does not fit.
    """
    if tp.device.type == "cpu":
        num_fitting = num_fitting_blocks_on_cpu(config, block_bytes)
    else:
        num_fitting = num_fitting_blocks_on_gpu(config, tp.device, block_bytes, measure_steps())
    return choose_num_blocks(config, tp, num_fitting)


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
