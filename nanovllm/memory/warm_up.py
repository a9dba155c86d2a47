"""The largest steps, run once: so that kernels are compiled and loaded, and it is known what memory steps take."""

from collections.abc import Callable

import numpy as np
import torch

from nanovllm.config import Config
from nanovllm.engine.device_rows import DeviceRows
from nanovllm.engine.step_input import StepShape
from nanovllm.graphs.cuda_graphs import CudaGraphs


def warm_up(config: Config, rows: DeviceRows, graphs: CudaGraphs, forward: Callable[[StepShape], None]) -> int:
    """Runs the largest steps by `forward`, which works on `rows`; returns the bytes of GPU memory that steps take."""
    max_num_seqs, max_num_tokens = config.max_num_seqs, config.max_num_batched_tokens
    longest_prompt = config.max_model_len - 1
    num_prompts = min(max_num_seqs, -(-max_num_tokens // longest_prompt))
    prompt_len = min(max_num_tokens // num_prompts, longest_prompt)
    decodes = StepShape(max_num_seqs, num_prompts=0, num_tokens=0, is_filtered=False)
    prompts = StepShape(0, num_prompts, num_tokens=num_prompts * prompt_len, is_filtered=False)
    if config.sampler_backend == "triton":  # torch's compiles itself when it is first called
        can_capture = config.attention_backend != "torch"
        graphs.rehearse(forward, [prompts, decodes] if can_capture else [decodes])
    torch.cuda.reset_peak_memory_stats(rows.device)
    before = torch.cuda.memory_allocated(rows.device)
    # Decodes first, as kernels are not loaded while the GPU is busy, and the prompts will keep it busy.
    rows.decode_rows.copy_(torch.arange(max_num_seqs))
    forward(decodes)
    parts = np.array([(row, 0, prompt_len) for row in range(num_prompts)])
    token_ids = np.zeros(prompts.num_tokens, dtype=np.int64)
    rows.set_prompts(parts, token_ids, False, prompts)
    forward(prompts)
    rows.context_lens.zero_()
    rows.device_step_count.zero_()
    torch.cuda.synchronize(rows.device)
    peak = torch.cuda.max_memory_allocated(rows.device) - before
    torch.cuda.empty_cache()
    return 2 * peak if graphs.shapes else peak  # graphs have memory of their own
