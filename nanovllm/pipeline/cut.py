"""Cuts a model down to a stage: what other stages have is dropped, states come and go in place of its two ends.

So the models themselves need not know of stages. A model that was just made has no weights but those of its ends and
norms, and these are not filled yet.
"""

import torch
from torch import Tensor, nn

from nanovllm.checkpoint.loader import spellings_of
from nanovllm.config import Config
from nanovllm.layers.residual import Residual
from nanovllm.models.qwen3 import Qwen3ForCausalLM
from nanovllm.parallel.row_parallel import PendingSum
from nanovllm.pipeline.stage import Stage


class ReceivedStates(nn.Module):
    """In place of the embedding, in all stages but the first: token ids [N] -> the states [N, hidden] that came."""

    def __init__(self, stage: Stage, weight: nn.Parameter | None) -> None:
        """`weight` is the embedding's table, where the head is tied to it."""
        super().__init__()
        self.stage = stage
        self.weight = weight

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.stage.states[: len(input_ids)]


class SentStates(nn.Module):
    """In place of the last norm, in all stages but the last: puts the residual stream [N, hidden] where it is sent."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, x: Residual) -> Tensor:
        x = x.add() if isinstance(x, PendingSum) else x
        return self.stage.states[: len(x)].copy_(x)


def cut(model: Qwen3ForCausalLM, config: Config, stage: Stage, max_num_tokens: int) -> None:
    """Cuts a model, whose weights are yet to be filled, down to a stage that computes so many tokens at most."""
    shape = max_num_tokens, config.model_config.hidden_size
    stage.states = torch.zeros(shape, dtype=config.torch_dtype, device=stage.device)
    decoder, elsewhere = model.model, []
    for index in set(range(len(decoder.layers))).difference(stage.layers):
        delattr(decoder.layers, str(index))  # the others keep their numbers
        elsewhere.append(f"model.layers.{index}.")
    if not stage.is_first:
        has_table = stage.is_last and config.model_config.tie_word_embeddings
        decoder.embed_tokens = ReceivedStates(stage, decoder.embed_tokens.weight if has_table else None)
        elsewhere += [] if has_table else ["model.embed_tokens."]
    if not stage.is_last:
        decoder.norm = SentStates(stage)
        del model.lm_head
        elsewhere += ["model.norm.", "lm_head."]
    model.ignored_tensors += tuple(spelling for prefix in elsewhere for spelling in spellings_of(model, prefix))
