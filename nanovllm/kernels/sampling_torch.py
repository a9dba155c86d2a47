"""The next tokens of a batch: temperature, min-p, top-k, top-p and a draw, in plain torch, as one would explain it.

softmax(logits / temperature) gives each token a probability. Filters take the unlikely ones away: min-p those below a
share of the largest probability, top-k all but the k largest, top-p all but the largest that make up a share of the
mass. Each is a threshold for logits, since larger logits are larger probabilities.

The draw is a race: a token with probability p arrives after Exp(1) / p, and the first to arrive has won with just that
probability. In logarithms, where neither a sum nor a softmax is needed, that is argmax(logits / temperature + noise)
with noise = -log(Exp(1)), which is Gumbel's distribution (Gumbel 1954; arXiv 1411.0030). Temperature 0 is greedy: no
noise.

The noise comes from no generator. It is a hash of (seed, position, token id), so that a request draws the same tokens
whatever it is batched with and however the vocabulary is split over ranks.

On CUDA the draw goes through torch.compile, which makes one pass of its many; the filters sort, which is a library's
work. On a CPU all runs as it stands: a compiler may be missing there, takes most of a minute if not, and has little to
win beside the model. `sampling.py` has the same functions once more, written in Triton: equal draws, made sooner. This
file knows nothing of requests, steps or ranks: it is handed logits and a table of parameters.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from nanovllm.kernels.sampling import LOW_32_BITS, flip, hash32, pack_draw


def sample(
    logits: Tensor,
    rows: Tensor,
    row_ints: Tensor,
    row_floats: Tensor,
    positions: Tensor,
    start: int,
    is_filtered: bool,
    is_compiled: bool = False,
) -> Tensor:
    """The draws, packed, int64 [B], of logits [B, V] of the token ids from `start` on; else as `Sampler.forward`.

    With is_compiled, the draw is. The filters are not: beside the sort, there is a running sum that torch 2.11 fails
    to compile for rows so long.
    """
    top_k, seeds = row_ints[:2]
    temperature, top_p, min_p = row_floats[:3]
    low = filter_thresholds(logits, rows, temperature, top_k, top_p, min_p) if is_filtered else None
    make_draws = compiled_draw if is_compiled else draw
    return make_draws(logits, rows, temperature, seeds, positions, start, low)


compiled_sample: Callable[..., Tensor] = functools.partial(sample, is_compiled=True)


def filter_thresholds(
    logits: Tensor, rows: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> Tensor:
    """The least logits, float32 [B], that the filters of the rows keep; -inf where a row is not filtered.

    logits: [B, V]. rows: [B] int64, where in the others a row's filters stand. temperature: [R] float32; a row at 0
    (greedy) is not filtered. With probabilities softmax(logits / temperature), three filters apply in this order:
    min_p [R] float32 keeps p >= min_p * max(p) (0: all); top_k [R] int64 keeps the k largest of the rest (<= 0: all);
    top_p [R] float32 keeps the smallest set of the largest whose share of the mass that is left reaches top_p (1:
    all). Ties at a border are kept, and so is always the largest.
    """
    temperature, top_k, top_p, min_p = (values[rows, None] for values in (temperature, top_k, top_p, min_p))
    ordered = logits.float().sort(dim=-1, descending=True).values
    highest, last = ordered[:, :1], logits.size(1) - 1
    # min-p: exp((x - highest) / temperature) >= min_p
    low = torch.where(min_p > 0, highest + temperature * torch.log(min_p), -torch.inf)
    # top-k: the k-th largest
    kth = ordered.gather(1, (top_k - 1).clamp(0, last))
    low = torch.where(top_k > 0, torch.maximum(low, kth), low)
    # top-p: the first whose cumulative mass reaches the share
    weights = torch.exp((ordered - highest) / temperature)
    mass = torch.where(ordered >= low, weights, 0.0).double().cumsum(-1)
    num_before = (mass < top_p * mass[:, -1:]).sum(-1, keepdim=True)
    reaching = ordered.gather(1, num_before.clamp(max=last))
    low = torch.where(top_p < 1, torch.maximum(low, reaching), low)
    return torch.where(temperature > 0, low, -torch.inf)[:, 0]


def draw(
    logits: Tensor,
    rows: Tensor,
    temperature: Tensor,
    seeds: Tensor,
    positions: Tensor,
    start: int = 0,
    low: Tensor | None = None,
) -> Tensor:
    """The best of logits / temperature + noise in each row, and the token id that has it.

    Args:
        logits: [B, V] of the token ids from `start` on, any float type.
        rows: int64 [B], where in temperature and seeds a row's stand.
        temperature: float32 [R]; 0 is greedy: the best logit, without noise.
        seeds: int64 [R].
        positions: int64 or int32 [B].
        start: the first column's token id.
        low: float32 [B]; a row's logits below it are not drawn. None: all may be.

    Returns:
        int64 [B], (score, id) packed by `pack_draw`: the maximum over several ranks' results is the result for all of
        the vocabulary. A row with infinite or NaN logits has an infinite score, one without any above -inf a score of
        -inf: neither is a token, which `unpack_draw` tells.
    """
    logits, temperature = logits.float(), temperature[rows, None]
    scores = logits if low is None else logits.masked_fill(logits < low[:, None], -torch.inf)
    # Without noise where all are greedy; but on a GPU, to ask would be to wait.
    if torch.compiler.is_compiling() or temperature.is_cuda or temperature.any():
        token_ids = torch.arange(start, start + logits.size(1), device=logits.device)
        noise = gumbel_noise(seeds[rows], positions, token_ids)
        scores = torch.where(temperature == 0, scores, scores / temperature + noise)
    scores = torch.where(logits < torch.inf, scores, torch.inf)  # NaN too
    best, index = scores.max(dim=-1)  # of equals, the first
    return pack_draw(flip(best.view(torch.int32)).long(), start + index)


@functools.cache
def _compile_draw() -> Callable[..., Tensor]:
    """Not done on import, as it takes seconds to import the compiler."""
    return torch.compile(draw)


def compiled_draw(
    logits: Tensor, rows: Tensor, temperature: Tensor, seeds: Tensor, positions: Tensor, start: int, low: Tensor | None
) -> Tensor:
    """`draw`, compiled once for batches of all sizes (and once for those of one row)."""
    # Copies are alike, wherever rows and positions come from: else a view of another tensor, and a tensor that was not
    # made in inference mode, would be cases of their own.
    rows, positions = rows.clone(), positions.clone()
    for tensor in (logits, rows, positions) if low is None else (logits, rows, positions, low):
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return _compile_draw()(logits, rows, temperature, seeds, positions, start, low)


def gumbel_noise(seeds: Tensor, positions: Tensor, token_ids: Tensor) -> Tensor:
    """Standard Gumbel noise, float32 [B, V], of int64 seeds [B], int positions [B] and int64 token ids [V]."""
    keys = hash32(hash32(seeds & LOW_32_BITS) ^ ((seeds >> 32) & LOW_32_BITS))
    keys = hash32(keys ^ hash32(positions.long()))
    bits = hash32((token_ids + keys[:, None]) & LOW_32_BITS)
    # The winner has a small exponential: from a uniform near 0, where float32 is fine, and not from one near 1.
    uniform = ((bits.float() + 0.5) * 2**-32).clamp(max=1 - 2**-24)  # the largest float32 below 1
    exponential = -torch.log1p(-uniform)
    return -torch.log(exponential)
