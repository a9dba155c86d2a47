"""The pre-norm decoder that all supported families share; a family says what its attention has.

The residual stream x [N, hidden] runs through all layers. What reads it norms it; what adds to it does so in place, or
leaves parts of a sum over the ranks, which the next norm adds.
"""

from typing import ClassVar

from torch import Tensor, nn

from nanovllm.config import Config
from nanovllm.kernels.norm_act import rms_norm
from nanovllm.layers.attention import Attention
from nanovllm.layers.embed_head import ParallelLMHead
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.linear import MergedColumnParallelLinear, Parts, QKVParallelLinear, RowParallelLinear
from nanovllm.layers.rotary_embedding import rotary_table
from nanovllm.parallel.tensor_parallel import TensorParallel
from nanovllm.utils.context import Context


class SelfAttention(nn.Module):
    """x += o(attention(qkv(norm(x)))) on [N, hidden], with biases, or an RMSNorm of each q and k head, or not."""

    def __init__(self, config: Config, tp: TensorParallel, rotary_table: Tensor, has_qkv_bias: bool,
            has_qk_norm: bool) -> None:  # fmt: skip
        super().__init__()
        c = config.model_config
        heads, kv_heads, dim = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.qkv_proj = QKVParallelLinear(c.hidden_size, dim, heads, kv_heads, has_qkv_bias or c.attention_bias, tp)
        self.o_proj = RowParallelLinear(heads * dim, c.hidden_size, c.attention_bias and not has_qkv_bias, tp)
        self.q_norm = RMSNorm(dim, c.rms_norm_eps, tp) if has_qk_norm else None
        self.k_norm = RMSNorm(dim, c.rms_norm_eps, tp) if has_qk_norm else None
        self.attn = Attention(dim, config.attention_backend, rotary_table)

    def forward(self, x: Tensor, parts: Parts, norm: RMSNorm, positions: Tensor, context: Context,
            rows: Tensor | None) -> tuple[Tensor, Parts]:  # fmt: skip
        """With `rows`, the keys and values of all tokens are stored, but only those rows go on."""
        o = self.attn(self.qkv_proj(x, parts, norm), positions, context, self.q_norm, self.k_norm)
        if rows is not None:
            x, o = x[rows], o[rows]
        return x, self.o_proj(o, residual=x)


class GatedMLP(nn.Module):
    """x += down(silu(gate(norm(x))) * up(norm(x))) on [N, hidden]."""

    def __init__(self, hidden_size: int, intermediate_size: int, bias: bool, tp: TensorParallel) -> None:
        super().__init__()
        self.gate_up_proj = MergedColumnParallelLinear(hidden_size, intermediate_size, bias, tp)
        self.down_proj = RowParallelLinear(intermediate_size, hidden_size, bias, tp)

    def forward(self, x: Tensor, parts: Parts, norm: RMSNorm) -> Parts:
        return self.down_proj(self.gate_up_proj(x, parts, norm), residual=x)


class DecoderLayer(nn.Module):
    """Attention, of which `facts` say what the family's has, then the feed-forward block."""

    def __init__(self, config: Config, tp: TensorParallel, rotary_table: Tensor, **facts: bool) -> None:
        super().__init__()
        c = config.model_config
        self.self_attn = SelfAttention(config, tp, rotary_table, **facts)
        self.mlp = GatedMLP(c.hidden_size, c.intermediate_size, c.mlp_bias, tp)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, tp)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, tp)

    def forward(self, x: Tensor, parts: Parts, positions: Tensor, context: Context,
            rows: Tensor | None) -> tuple[Tensor, Parts]:  # fmt: skip
        x, parts = self.self_attn(x, parts, self.input_layernorm, positions, context, rows)
        return x, self.mlp(x, parts, self.post_attention_layernorm)


class Decoder(nn.Module):
    """Token ids [N] to hidden states [N, hidden], or of `logits_indices` only, and parts that are to be added to them.

    The LM head adds those and applies `norm`.
    """

    def __init__(self, config: Config, tp: TensorParallel, **facts: bool) -> None:
        super().__init__()
        c = config.model_config
        table = rotary_table(c, config.max_model_len, tp.device)
        # Whole on every rank: a split table would take a sum over the ranks.
        self.embed_tokens = nn.Embedding.from_pretrained(tp.parameter(c.vocab_size, c.hidden_size))
        self.layers = nn.ModuleList(DecoderLayer(config, tp, table, **facts) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps, tp)

    def forward(self, input_ids: Tensor, positions: Tensor, context: Context) -> tuple[Tensor, Parts]:
        x, parts, rows = self.embed_tokens(input_ids), None, None
        for layer in self.layers:
            if layer is self.layers[-1] and context.logits_indices is not None:
                if parts is not None:
                    x = rms_norm(x, None, 0.0, parts)  # only adds them
                parts, rows = None, context.logits_indices
            x, parts = layer(x, parts, positions, context, rows)
        return x, parts


class CausalLM(nn.Module):
    """A decoder with its LM head. Its parameters have a checkpoint's names, but for the modules that fuse several."""

    packed_modules_mapping: ClassVar = {
        "qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}  # fmt: skip
    has_qkv_bias: ClassVar = False  # whatever config.json says; it decides on the biases otherwise
    has_qk_norm: ClassVar = False

    def __init__(self, config: Config, tp: TensorParallel) -> None:
        super().__init__()
        c = config.model_config
        self.model = Decoder(config, tp, has_qkv_bias=self.has_qkv_bias, has_qk_norm=self.has_qk_norm)
        table = self.model.embed_tokens.weight if c.tie_word_embeddings else None
        self.lm_head = ParallelLMHead(c.vocab_size, c.hidden_size, tp, table)

    def forward(self, input_ids: Tensor, positions: Tensor, context: Context) -> tuple[Tensor, Parts]:
        """Token ids and positions [N] -> hidden states [N, hidden], or of `logits_indices` only, and parts to add."""
        return self.model(input_ids, positions, context)

    def compute_logits(self, hidden_states: Tensor, parts: Parts) -> Tensor:
        """Hidden states [M, hidden], and parts to add -> this rank's logits [M, vocab / ranks]."""
        return self.lm_head(hidden_states, parts, self.model.norm)
