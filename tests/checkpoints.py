"""Small random checkpoints of every supported family, and what transformers generates with them."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path

import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCAB_SIZE = 320
MAX_POSITIONS = 512
# Enough of them that some requests end by one. Token 1 is in config.json, all are in generation_config.json.
EOS_TOKEN_IDS = [1, *range(40, 46)]
# Chosen so that the best logits of `mixed_prompts` lead by 4e-4 at least, and the last expert that a router chooses
# by 1e-4: far more than float32 arithmetic errs.
SEED = 2
SEEDS = {"mistral_window": 3, "qwen2_moe": 3, "olmo2": 16}  # of families where another one is needed
SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_POSITIONS,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 40}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,  # so that the scaling changes what 300 tokens attend to
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + i / 4 for i in range(12)],
    "long_factor": [1.0 + i for i in range(12)],
}


def with_rope(config: type[PretrainedConfig], rope: dict, **options) -> PretrainedConfig:
    """A config with rotary options, in the spelling of this transformers: `rope_parameters` from 5.0 on."""
    if "rope_parameters" in config().to_dict():
        return config(rope_parameters=rope, **options)
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    return config(rope_theta=rope["rope_theta"], rope_scaling=scaling, **options)


# No two heads are as wide, so that head_dim is not taken for hidden_size / num_attention_heads (16).
CONFIGS = {
    "qwen3": lambda: Qwen3Config(**SHAPE, head_dim=32, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**SHAPE, tie_word_embeddings=False),
    "llama": lambda: with_rope(LlamaConfig, LLAMA3_ROPE, **SHAPE, head_dim=24, tie_word_embeddings=False),
    "llama_bias": lambda: LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "mistral": lambda: MistralConfig(**SHAPE | {"num_key_value_heads": 4}, head_dim=20, sliding_window=None),
    # Windows much shorter than most prompts, on every other layer, and caps that most scores and logits feel.
    "gemma2": lambda: Gemma2Config(
        **SHAPE,
        head_dim=28,
        query_pre_attn_scalar=20,
        sliding_window=24,
        attn_logit_softcapping=3.0,
        final_logit_softcapping=1.0,
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **SHAPE | {"num_hidden_layers": 4, "num_key_value_heads": 1},
        head_dim=36,
        query_pre_attn_scalar=20,
        sliding_window=24,
        sliding_window_pattern=2,
        rope_theta=5000.0,
        rope_local_base_freq=100.0,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
    ),
    # Windows that are shorter than most prompts, and not of whole blocks.
    "mistral_window": lambda: MistralConfig(**SHAPE, head_dim=20, sliding_window=24),
    "qwen2_window": lambda: Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=40, max_window_layers=1),
    # One dense layer and a sparse one.
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **SHAPE, **EXPERTS, head_dim=32, num_experts=6, norm_topk_prob=True, mlp_only_layers=[0]
    ),
    "mixtral": lambda: MixtralConfig(
        **SHAPE | {"intermediate_size": 48}, head_dim=24, num_local_experts=4, num_experts_per_tok=2
    ),
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **SHAPE, **EXPERTS, num_experts=5, norm_topk_prob=False, shared_expert_intermediate_size=56
    ),
    "phi3": lambda: with_rope(
        Phi3Config,
        LONGROPE,
        **SHAPE | {"num_attention_heads": 2, "num_key_value_heads": 1},  # heads of 32, of which 24 rotate
        partial_rotary_factor=0.75,
        original_max_position_embeddings=320,
        sliding_window=100,
        pad_token_id=None,
    ),
    # One layer has rope, the other a window.
    "smollm3": lambda: transformers.SmolLM3Config(
        **SHAPE, no_rope_layers=[1, 0], use_sliding_window=True, sliding_window=50, pad_token_id=None
    ),
    "olmo2": lambda: Olmo2Config(**SHAPE, attention_bias=True),
    "granite": lambda: GraniteConfig(
        **SHAPE, embedding_multiplier=3.0, residual_multiplier=0.4, attention_multiplier=0.15, logits_scaling=2.0
    ),
}
# The oldest transformers that is supported has no SmolLM3.
FAMILIES = [family for family in CONFIGS if family != "smollm3" or hasattr(transformers, "SmolLM3Config")]
FIRST_FAMILIES = FAMILIES[:3]  # which go through all scenarios by default, the others through some


class Checkpoint:
    """A random float32 model: its folder, and transformers' model of it."""

    def __init__(self, config: PretrainedConfig, folder: Path, seed: int = SEED) -> None:
        self.path = str(folder)
        # Some versions let sdpa compute Gemma 2, which does not know its soft caps.
        attention = {"attn_implementation": "eager"} if config.model_type == "gemma2" else {}
        self.model = AutoModelForCausalLM.from_config(config, **attention).float().eval()
        # The same weights from every version of transformers; matrices so large that the best logit leads clearly.
        # Norms and biases too are random, so that none can be skipped or swapped unseen.
        generator = torch.Generator().manual_seed(seed)
        is_gemma = config.model_type.startswith("gemma")
        norm_mean = 0.0 if is_gemma else 1.0  # Gemma's add 1 to their weights
        for name, parameter in sorted(self.model.named_parameters()):
            mean = norm_mean if "norm" in name else 0.0
            # Gemma scales embeddings: less of them, so that the tied head does not only repeat tokens.
            std = 0.05 if is_gemma and "embed_tokens" in name else 0.2
            parameter.data.normal_(mean, std, generator=generator)
        self.model.generation_config.eos_token_id = EOS_TOKEN_IDS
        self.model.save_pretrained(folder)
        self.greedy = cache(self._greedy)

    @torch.inference_mode()
    def _greedy(self, prompt: tuple[int, ...], max_tokens: int, ignore_eos: bool = False) -> tuple[list[int], str]:
        """The greedy tokens, each by a forward pass over the whole text, and the finish reason."""
        ids = list(prompt)
        for _ in range(max_tokens):
            ids.append(int(self.model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] in EOS_TOKEN_IDS and not ignore_eos:
                return ids[len(prompt) :], "stop"
        return ids[len(prompt) :], "length"


def random_prompt(seed: int, length: int, vocab_size: int = VOCAB_SIZE) -> tuple[int, ...]:
    """Token ids that are the same each time."""
    generator = random.Random(seed)
    return tuple(generator.randrange(2, vocab_size) for _ in range(length))


def mixed_prompts() -> list[tuple[int, ...]]:
    """Short and long prompts, of which some share their first blocks, and the last one all but its last token."""
    base = random_prompt(0, 270)
    alone = [random_prompt(length, length) for length in (3, 17, 251, 64, 90, 50, 245, 250)]
    return [*alone, base, (*base[:262], 7, 8, 9), (*base[:48], 7, 8), base[:257]]
