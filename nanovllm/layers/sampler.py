"""The layer that draws the next tokens: it chooses who computes, and brings the ranks' parts together.

What a draw is, `kernels/sampling_torch.py` explains. Nothing here knows of requests or steps.
"""

from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn

from nanovllm.kernels import sampling, sampling_torch, use_triton
from nanovllm.parallel.tensor_parallel import TensorParallel


class Sampler(nn.Module):
    """The next tokens, int64 [B] and packed, alike on all ranks, of this rank's logits [B, vocab / ranks]."""

    def __init__(self, tp: TensorParallel, backend: Literal["auto", "triton", "torch"] = "auto") -> None:
        """With "auto", the logits' device decides: Triton if it can compute there."""
        super().__init__()
        self.tp = tp
        self.backend = backend
        self.sample: Callable[..., Tensor] | None = None

    def forward(
        self, logits: Tensor, rows: Tensor, row_ints: Tensor, row_floats: Tensor, positions: Tensor, is_filtered: bool
    ) -> Tensor:
        """Of R requests' sampling parameters, those of rows count, int64 [B].

        row_ints: int64 [2 or more, R], top_k and seed first. row_floats: float32 [3 or more, R], temperature, top_p
        and min_p first. positions: int32 or int64 [B]. is_filtered: whether some row asks for top-k, top-p or min-p.
        """
        if self.sample is None:
            self.sample = self.choose(logits)
            if self.sample is sampling_torch.compiled_sample:
                # The first call must compile all cases, as none can be while a CUDA graph is captured. Torch makes
                # batches of one row a case of their own, and one of any other sizes.
                for num_rows in (len(logits), 1):
                    for case in (True, False):
                        self(logits[:num_rows], rows[:num_rows], row_ints, row_floats, positions[:num_rows], case)
        if is_filtered:
            # Filters need whole distributions; every rank then draws alike.
            logits = self.tp.all_gather(logits)
            return self.sample(logits, rows, row_ints, row_floats, positions, 0, True)
        # Each rank offers its best candidate.
        start = self.tp.rank * logits.size(1)
        return self.tp.max(self.sample(logits, rows, row_ints, row_floats, positions, start, False))

    def choose(self, logits: Tensor) -> Callable[..., Tensor]:
        """What draws from these logits."""
        if self.backend == "triton" or (self.backend == "auto" and use_triton(logits)):
            return sampling.sample
        return sampling_torch.compiled_sample if logits.is_cuda else sampling_torch.sample
