"""Qwen3 (arXiv 2505.09388): a pre-norm decoder with rotary embeddings, grouped-query attention and a gated MLP.

The residual stream x [N, hidden] runs through all layers; what reads it normalises it, what computes adds to it. N are
the tokens of a step, sequence after sequence, whatever part of a prompt or of an answer they are; only attention looks
beyond its own row. This file knows nothing of caches, kernels and devices. Where several operations become one kernel,
the layers see to it: a norm, for one, is computed by the product that reads it.
"""

from typing import ClassVar

from torch import Tensor, nn

from nanovllm.config import Config
from nanovllm.layers.activation import SiluAndMul
from nanovllm.layers.attention import Attention
from nanovllm.layers.embed_head import ParallelLMHead, VocabParallelEmbedding
from nanovllm.layers.layernorm import Normalised, RMSNorm
from nanovllm.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from nanovllm.layers.residual import Residual, only_sampled
from nanovllm.layers.rotary_embedding import rotary_table
from nanovllm.parallel.tensor_parallel import TensorParallel
from nanovllm.utils.context import Context


class Qwen3Attention(nn.Module):
    """x + o(attention(q, k, v)): each query and key head is normalised, then rotated by its position.

    Without a residual x, the second part of the sum is what it gives; so does the MLP.
    """

    has_qk_norm: ClassVar[bool] = True
    has_qkv_bias: ClassVar[bool] = False  # whatever config.json says of biases
    norm_class: ClassVar[type[RMSNorm]] = RMSNorm

    def __init__(self, config: Config, tp: TensorParallel, rotary_table: Tensor, index: int) -> None:
        super().__init__()
        c = config.model_config
        heads, kv_heads, head_dim = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        has_qkv_bias = c.attention_bias or c.qkv_bias or self.has_qkv_bias
        self.qkv_proj = QKVParallelLinear(c.hidden_size, head_dim, heads, kv_heads, has_qkv_bias, tp)
        self.q_norm = self.norm_class(head_dim, c.rms_norm_eps, tp) if self.has_qk_norm else None
        self.k_norm = self.norm_class(head_dim, c.rms_norm_eps, tp) if self.has_qk_norm else None
        self.attn = Attention(
            head_dim,
            config.attention_backend,
            rotary_table,
            scale=c.attention_scale,
            window=c.layer_windows[index],
            soft_cap=c.attn_logit_softcapping,
        )
        self.o_proj = RowParallelLinear(heads * head_dim, c.hidden_size, c.attention_bias, tp)

    def forward(
        self, positions: Tensor, x: Normalised | Tensor, context: Context, residual: Residual | None = None
    ) -> Residual:
        qkv = self.qkv_proj(x)
        o = self.attn(qkv, positions, context, self.q_norm, self.k_norm)
        return self.o_proj(o, residual)


class Qwen3MLP(nn.Module):
    """x + down(silu(gate) * up)."""

    activation_class: ClassVar[type[nn.Module]] = SiluAndMul

    def __init__(self, config: Config, tp: TensorParallel) -> None:
        super().__init__()
        c = config.model_config
        self.gate_up_proj = MergedColumnParallelLinear(c.hidden_size, c.intermediate_size, c.mlp_bias, tp)
        self.act_fn = self.activation_class()
        self.down_proj = RowParallelLinear(c.intermediate_size, c.hidden_size, c.mlp_bias, tp)

    def forward(self, x: Normalised | Tensor, residual: Residual | None = None) -> Residual:
        gate_up = self.gate_up_proj(x)
        return self.down_proj(self.act_fn(gate_up), residual)


class Qwen3DecoderLayer(nn.Module):
    """x = x + attention(norm(x)), x = x + mlp(norm(x))."""

    attention_class: ClassVar[type[Qwen3Attention]] = Qwen3Attention
    norm_class: ClassVar[type[RMSNorm]] = RMSNorm

    def __init__(self, config: Config, tp: TensorParallel, rotary_table: Tensor, index: int) -> None:
        super().__init__()
        c = config.model_config
        self.self_attn = self.attention_class(config, tp, rotary_table, index)
        self.mlp = self.make_mlp(config, tp, index)
        self.input_layernorm = self.norm_class(c.hidden_size, c.rms_norm_eps, tp)
        self.post_attention_layernorm = self.norm_class(c.hidden_size, c.rms_norm_eps, tp)
        self.is_last = index == c.num_hidden_layers - 1

    def make_mlp(self, config: Config, tp: TensorParallel, index: int) -> nn.Module:
        """The layer's MLP, by the layer's index, or what a family has in its place."""
        return Qwen3MLP(config, tp)

    def forward(self, positions: Tensor, x: Residual, context: Context) -> Residual:
        x = self.self_attn(positions, self.input_layernorm(x), context, residual=x)
        if self.is_last:
            x = only_sampled(x, context)
        return self.mlp(self.post_attention_layernorm(x), residual=x)


class Qwen3Model(nn.Module):
    """Token ids [N] to the normalised hidden states [N, hidden], or of the M tokens that are sampled from."""

    def __init__(self, config: Config, tp: TensorParallel, layer_class: type[Qwen3DecoderLayer]) -> None:
        super().__init__()
        c = config.model_config
        tables = {rope: rotary_table(rope, c.head_dim, config.max_model_len, tp.device) for rope in {*c.layer_ropes}}
        self.embed_tokens = VocabParallelEmbedding(c.vocab_size, c.hidden_size, tp)
        self.layers = nn.ModuleList(
            layer_class(config, tp, tables[rope], index) for index, rope in enumerate(c.layer_ropes)
        )
        self.norm = layer_class.norm_class(c.hidden_size, c.rms_norm_eps, tp)

    def forward(self, input_ids: Tensor, positions: Tensor, context: Context) -> Normalised | Tensor:
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(positions, x, context)
        return self.norm(x)


class Qwen3ForCausalLM(nn.Module):
    """The decoder with its head. Parameters have a checkpoint's names, but for the modules that fuse several."""

    packed_modules_mapping: ClassVar[dict[str, tuple[str, ...]]] = {
        "qkv_proj": ("q_proj", "k_proj", "v_proj"),
        "gate_up_proj": ("gate_proj", "up_proj"),
    }
    checkpoint_layouts: ClassVar[tuple[dict[str, str], ...]] = ()  # other names of tensors: ours -> theirs
    ignored_tensors: ClassVar[tuple[str, ...]] = ()  # what the names begin with that are passed over
    layer_class: ClassVar[type[Qwen3DecoderLayer]] = Qwen3DecoderLayer

    def __init__(self, config: Config, tp: TensorParallel) -> None:
        super().__init__()
        c = config.model_config
        self.model = Qwen3Model(config, tp, self.layer_class)
        tied_weight = self.model.embed_tokens.weight if c.tie_word_embeddings else None
        self.lm_head = ParallelLMHead(c.vocab_size, c.hidden_size, tp, tied_weight, c.final_logit_softcapping)

    def forward(self, input_ids: Tensor, positions: Tensor, context: Context) -> Normalised | Tensor:
        """Token ids and positions [N] -> hidden states for `compute_logits`, [M, hidden], see `only_sampled`."""
        return self.model(input_ids, positions, context)

    def compute_logits(self, hidden_states: Normalised | Tensor) -> Tensor:
        """Hidden states [M, hidden] -> this rank's logits [M, vocab / ranks]."""
        return self.lm_head(hidden_states)
