"""What the ranks are told of a step's sampling where a request asks for more than a draw from its logits as they are.

That is whose logits are adjusted, and by what, and whose logprobs are told. Of all other steps nothing is said.
"""

import functools
import operator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from nanovllm.sampling.adjustments import TABLES, TableChanges, list_changes
from nanovllm.sampling.logprobs import list_prompt_targets, num_logprobs_of

if TYPE_CHECKING:
    from nanovllm.engine.scheduler import Batch
    from nanovllm.engine.step_input import StepShape


class SamplingInput(NamedTuple):
    """What a step's shape does not say.

    Attributes:
        table_changes: to the tables by which logits are adjusted; None: there are none.
        prompt_targets: [L, 2] int64, of the prompts' tokens whose logprobs are asked for, which among the prompts'
            tokens tells its successor's, and the successor.
        num_prompt_logprobs: the logprobs told of each of them, as `StepShape.num_logprobs`.
    """

    table_changes: TableChanges | None
    prompt_targets: np.ndarray
    num_prompt_logprobs: int


def add_sampling(shape: "StepShape", batch: "Batch", vocab_size: int) -> tuple["StepShape", SamplingInput | None]:
    """A step's shape with what its requests ask for, and the rest; None: all of them are plain."""
    asking = [seq for seq in batch.seqs if seq.adjustment is not None or seq.logprobs is not None]
    if not asking:
        return shape, None
    flags = functools.reduce(operator.or_, (seq.adjustment.flags for seq in asking if seq.adjustment is not None), 0)
    told = [seq.logprobs for seq in asking if seq.logprobs is not None]
    shape = shape._replace(
        adjusting=flags & TABLES, num_logprobs=num_logprobs_of((record.num_top for record in told), vocab_size)
    )
    return shape, SamplingInput(
        table_changes=list_changes(batch, vocab_size),
        prompt_targets=list_prompt_targets(batch),
        num_prompt_logprobs=num_logprobs_of((record.num_prompt_top for record in told), vocab_size),
    )
