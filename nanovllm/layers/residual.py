"""The residual stream between layers: a tensor, or with several ranks one that lacks a sum of theirs yet."""

from torch import Tensor

from nanovllm.parallel.row_parallel import PendingSum
from nanovllm.utils.context import Context

Residual = Tensor | PendingSum


def only_sampled(x: Residual, context: Context) -> Residual:
    """The rows of the residual stream [N, hidden] from which a token is sampled, [M, hidden].

    That is the last token of each sequence of the step. In the last layer, once attention is done, nobody needs the
    other tokens of a prompt any more: they are in the KV cache. The MLP and the head are spared them. A step of
    decodes samples from all rows, and keeps them.
    """
    if context.logits_indices is None:
        return x
    if isinstance(x, PendingSum):
        x = x.add()
    return x[context.logits_indices]
