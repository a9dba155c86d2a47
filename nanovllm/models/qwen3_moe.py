"""Qwen3 with a mixture of experts (arXiv 2505.09388), such as Qwen3-30B-A3B."""

from typing import ClassVar

from torch import nn

from nanovllm.config import Config
from nanovllm.experts.layers import SparseMLP
from nanovllm.models.qwen3 import Qwen3DecoderLayer, Qwen3ForCausalLM
from nanovllm.parallel.tensor_parallel import TensorParallel


class Qwen3MoeDecoderLayer(Qwen3DecoderLayer):
    """Most layers, if not all, have experts in place of an MLP."""

    sparse_mlp_class: ClassVar[type[SparseMLP]] = SparseMLP

    def make_mlp(self, config: Config, tp: TensorParallel, index: int) -> nn.Module:
        c = config.model_config
        if c.mixture is None or index not in c.mixture.layers:
            return super().make_mlp(config, tp, index)
        return self.sparse_mlp_class(c.hidden_size, c.mixture, tp)


class Qwen3MoeForCausalLM(Qwen3ForCausalLM):
    """The decoder of Qwen3 with sparse layers."""

    layer_class = Qwen3MoeDecoderLayer
