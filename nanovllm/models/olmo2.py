"""OLMo 2 (arXiv 2501.00656): a layer normalises what it adds, not what it reads; queries and keys as a whole."""

import torch
from torch import Tensor, nn

from nanovllm.checkpoint.loader import Shard
from nanovllm.config import Config
from nanovllm.layers.layernorm import Normalised, RMSNorm
from nanovllm.layers.residual import only_sampled
from nanovllm.models.llama import LlamaAttention
from nanovllm.models.qwen3 import Qwen3DecoderLayer, Qwen3ForCausalLM
from nanovllm.parallel.tensor_parallel import TensorParallel
from nanovllm.utils.context import Context
from nanovllm.weights.parts import Part


class Olmo2HeadsNorm(nn.Module):
    """Normalises rows of all heads, of which each rank has as many [N, size]: `part` of a projection's rows."""

    def __init__(self, part: Part, eps: float, tp: TensorParallel) -> None:
        super().__init__()
        self.eps = eps
        self.tp = tp
        self.weight = tp.parameter(part.size)
        self.weight.shards = [Shard((part.full_size,), 0, part.start, 0, part.size)]

    def forward(self, x: Tensor) -> Tensor:
        if self.tp.size == 1:
            return Normalised(x, self.weight, self.eps).compute()
        squares = self.tp.all_reduce(x.float().square().mean(-1, keepdim=True)) / self.tp.size
        return (x * (squares + self.eps).rsqrt() * self.weight).to(x.dtype)


class Olmo2Attention(LlamaAttention):
    """o(attention(q, k, v)): all of a token's queries are normalised as one, and its keys."""

    def __init__(self, config: Config, tp: TensorParallel, rotary_table: Tensor, index: int) -> None:
        super().__init__(config, tp, rotary_table, index)
        q, k, v = self.qkv_proj.rows
        self.q_norm, self.k_norm = (Olmo2HeadsNorm(part, config.model_config.rms_norm_eps, tp) for part in (q, k))
        self.sizes = q.size, k.size, v.size

    def forward(self, positions: Tensor, x: Tensor, context: Context) -> Tensor:
        q, k, v = self.qkv_proj(x).split(self.sizes, dim=1)
        qkv = torch.cat([self.q_norm(q), self.k_norm(k), v], dim=1)
        return self.o_proj(self.attn(qkv, positions, context, None, None))


class Olmo2DecoderLayer(Qwen3DecoderLayer):
    """x = x + norm(attention(x)), x = x + norm(mlp(x))."""

    attention_class = Olmo2Attention

    def __init__(self, config: Config, tp: TensorParallel, rotary_table: Tensor, index: int) -> None:
        super().__init__(config, tp, rotary_table, index)
        del self.input_layernorm
        self.post_feedforward_layernorm = RMSNorm(
            config.model_config.hidden_size, config.model_config.rms_norm_eps, tp
        )

    def forward(self, positions: Tensor, x: Tensor, context: Context) -> Tensor:
        x = self.post_attention_layernorm.add_to(x, self.self_attn(positions, x, context))
        if self.is_last:
            x = only_sampled(x, context)
        return self.post_feedforward_layernorm.add_to(x, self.mlp(x))


class Olmo2ForCausalLM(Qwen3ForCausalLM):
    """The decoder of Qwen3 with OLMo 2's layers."""

    layer_class = Olmo2DecoderLayer
