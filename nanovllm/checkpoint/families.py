"""What the supported families differ in, as far as config.json goes: their config classes in transformers, in a table.

To add a model is to add its family here and its class to models/families.py.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Literal


@dataclass(frozen=True)
class Family:
    """A family's config class.

    Attributes:
        model_type: what config.json calls the family; transformers chooses the model's class by it.
        defaults: of keys that config.json may lack.
        reads: which of the keys count that do so in some families only. Qwen2's biases are fixed, Mistral has none.
        activation: the only one of its MLPs, under `activation_key`.
        slides: which layers have the sliding window, where config.json does not say so itself.
            "everywhere": all of them.
            "always": all of them, whatever config.json says.
            "if asked": all of them, whatever else config.json says, if use_sliding_window.
            "from a layer on": those from max_window_layers on, if use_sliding_window.
            "every other": every other one before max_window_layers, from the first on, if use_sliding_window.
            "by pattern": all but each sliding_window_pattern-th.
            "without rope": those whose queries and keys do not rotate, if use_sliding_window.
            "in the cache": transformers 5 disagrees with itself: layers attend to everything, its KV cache forgets all
                but the window. The model is taken to have no more positions than that.
        rope_theta: default.
        partial_rotary_factor: default; None: the family rotates whole heads.
        rope_names: what it calls kinds of rotary embeddings, where that is not their name.
        has_local_rope: whether the sliding layers have a rotary embedding of their own.
        num_experts: of its sparse layers, default; None: it has none.
        expert_size_key: what says how wide an expert is.
        text_key: the object of config.json that says all this, of a model that takes more than text.
    """

    model_type: str
    defaults: dict[str, Any]
    reads: frozenset[str] = frozenset()
    activation: str = "silu"
    activation_key: str = "hidden_act"
    slides: Literal[
        "everywhere",
        "always",
        "if asked",
        "from a layer on",
        "every other",
        "by pattern",
        "without rope",
        "in the cache",
    ] = "in the cache"
    rope_theta: float = 10000.0
    partial_rotary_factor: float | None = None
    rope_names: dict[str, str] = field(default_factory=dict)
    has_local_rope: bool = False
    num_experts: int | None = None
    expert_size_key: str = "moe_intermediate_size"
    text_key: str | None = None


TEXT_KEY = "text_config"
QWEN_DEFAULTS = {
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
SPARSE_KEYS = frozenset({"decoder_sparse_step", "mlp_only_layers", "norm_topk_prob"})
BIASES = frozenset({"attention_bias", "mlp_bias"})
MULTIPLIERS = frozenset({"embedding_multiplier", "residual_multiplier", "logits_scaling"})
GEMMA_DEFAULTS = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
GEMMA_KEYS = frozenset({"attention_bias", "query_pre_attn_scalar", "final_logit_softcapping"})
# Gemma 3's class has a soft cap of scores too, which its attention does not read.
GEMMA3 = Family(
    "gemma3_text",
    GEMMA_DEFAULTS | {"vocab_size": 262208, "max_position_embeddings": 131072, "sliding_window_pattern": 6},
    GEMMA_KEYS | {"sliding_window_pattern"},
    activation="gelu_pytorch_tanh",
    activation_key="hidden_activation",
    slides="by pattern",
    rope_theta=1e6,
    has_local_rope=True,
)
FAMILIES = {
    "Gemma2ForCausalLM": Family(
        "gemma2",
        GEMMA_DEFAULTS
        | {
            "vocab_size": 256000,
            "max_position_embeddings": 8192,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        GEMMA_KEYS | {"attn_logit_softcapping"},
        activation="gelu_pytorch_tanh",
        activation_key="hidden_activation",
        slides="by pattern",
    ),
    "Gemma3ForCausalLM": GEMMA3,
    "Gemma3ForConditionalGeneration": replace(GEMMA3, model_type="gemma3", text_key=TEXT_KEY),
    "GraniteForCausalLM": Family(
        "granite", {"max_position_embeddings": 2048}, BIASES | MULTIPLIERS | {"attention_multiplier"}
    ),
    "LlamaForCausalLM": Family("llama", {"max_position_embeddings": 2048}, BIASES),
    "MistralForCausalLM": Family(
        "mistral",
        {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
        slides="everywhere",
    ),
    "MixtralForCausalLM": Family(
        "mixtral",
        {"max_position_embeddings": 131072, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "num_experts_per_tok": 2},
        slides="always",
        rope_theta=1e6,
        num_experts=8,
        expert_size_key="intermediate_size",
    ),
    "Olmo2ForCausalLM": Family(
        "olmo2", {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5}, frozenset({"attention_bias"})
    ),
    "Phi3ForCausalLM": Family(
        "phi3",
        {"max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
        slides="always",
        partial_rotary_factor=1.0,
        rope_names={"yarn": "longrope"},
    ),
    "Qwen2ForCausalLM": Family("qwen2", QWEN_DEFAULTS, slides="from a layer on"),
    "Qwen2MoeForCausalLM": Family(
        "qwen2_moe",
        QWEN_DEFAULTS
        | {
            "num_key_value_heads": 16,
            "qkv_bias": True,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
        },
        frozenset({"qkv_bias", "shared_expert_intermediate_size"}) | SPARSE_KEYS,
        slides="every other",
        num_experts=60,
    ),
    "Qwen3ForCausalLM": Family(
        "qwen3", QWEN_DEFAULTS | {"head_dim": 128}, frozenset({"attention_bias"}), slides="from a layer on"
    ),
    "Qwen3MoeForCausalLM": Family(
        "qwen3_moe",
        QWEN_DEFAULTS | {"num_key_value_heads": 4, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
        frozenset({"attention_bias"}) | SPARSE_KEYS,
        slides="if asked",
        num_experts=128,
    ),
    "SmolLM3ForCausalLM": Family(
        "smollm3",
        {
            "max_position_embeddings": 32768,
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
            "no_rope_layer_interval": 4,
        },
        BIASES | {"no_rope_layers", "no_rope_layer_interval"},
        slides="without rope",
        rope_theta=2e6,
    ),
}
