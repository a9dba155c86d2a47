"""Sampling of the next tokens, on logits that are split by vocabulary over tensor-parallel ranks."""

from torch import Tensor, nn

from nanovllm.kernels.sampling import draw, filter_thresholds
from nanovllm.parallel.tensor_parallel import TensorParallel


class Sampler(nn.Module):
    """The next tokens, int64 [B] packed by `draw`, alike on all ranks, of this rank's logits [B, vocab / ranks]."""

    def __init__(self, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp

    def forward(self, logits: Tensor, rows: Tensor, row_ints: Tensor, row_floats: Tensor, positions: Tensor,
            is_filtered: bool) -> Tensor:  # fmt: skip
        """Of R requests' sampling parameters, those of rows count, int64 [B].

        row_ints: int64 [2, R], top_k and seed. row_floats: float32 [3, R], temperature, top_p and min_p. positions:
        int32 or int64 [B]. is_filtered: whether some row asks for top-k, top-p or min-p.
        """
        top_k, seeds = row_ints
        temperature, top_p, min_p = row_floats
        if is_filtered:
            # Filters need whole distributions; every rank then draws alike.
            logits = self.tp.all_gather(logits)
            low = filter_thresholds(logits, rows, temperature, top_k, top_p, min_p)
            return draw(logits, rows, temperature, seeds, positions, low=low)
        # Each rank offers its best candidate.
        return self.tp.max(draw(logits, rows, temperature, seeds, positions, start=self.tp.rank * logits.size(1)))
