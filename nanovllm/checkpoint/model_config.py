"""The facts of a checkpoint's config.json, read and validated in one place.

The rule: a fact that changes what the model computes is honoured, or refused by its name and value; one that cannot
change it is passed over. tests/test_config_facts.py settles every field of transformers' config classes by it.

Where a key is absent, the default of the family's config class in transformers counts, or the absence is refused.
"""

import os
from dataclasses import dataclass
from typing import Any, Literal

from nanovllm.checkpoint.facts import JsonFacts
from nanovllm.checkpoint.files import read_object
from nanovllm.checkpoint.rope import DEFAULT_ROPE_THETA, FULL, ROPE_KEYS, SLIDING, Rope, read_ropes, with_outer_thetas

# What no layer here does, or what would have transformers read other files. Empty values say nothing.
REFUSED = (
    "quantization_config",
    "compression_config",  # an older name of the former
    "pruned_heads",
    "per_layer_config",
    "kv_sharing_modes",
    "transformers_weights",
    "configuration_files",
)
ACTIVATIONS = ("silu", "swish")  # two names of one function
DTYPE_KEYS = ("torch_dtype", "dtype")  # two spellings of one key
DEFAULT_MAX_WINDOW_LAYERS = 28
LAYER_TYPES = {FULL: FULL, SLIDING: SLIDING, "attention": FULL}  # the last is an older name


@dataclass(frozen=True)
class Family:
    """What the families' config classes in transformers differ in.

    Attributes:
        model_type: what config.json calls the family; transformers chooses the model's class by it.
        max_position_embeddings: default.
        num_key_value_heads: default; None: num_attention_heads.
        head_dim: default; None: hidden_size // num_attention_heads.
        reads_attention_bias: whether `attention_bias` counts; Qwen2's biases are fixed, Mistral has none.
        reads_mlp_bias: whether `mlp_bias` counts.
        sliding_window: default.
        slides: which layers have the window: those that config.json chooses, all of them, or those of Llama, where
            transformers 5 disagrees with itself: its layers attend to everything, its KV cache forgets all but the
            window.
        rope_theta: default.
        partial_rotary_factor: default; None: the family rotates whole heads.
        has_local_rope: whether the sliding layers have a rotary embedding of their own.
    """

    model_type: str
    max_position_embeddings: int
    num_key_value_heads: int | None
    head_dim: int | None
    reads_attention_bias: bool
    reads_mlp_bias: bool
    sliding_window: int | None
    slides: Literal["by choice", "everywhere", "in the cache"]
    rope_theta: float = DEFAULT_ROPE_THETA
    partial_rotary_factor: float | None = None
    has_local_rope: bool = False


FAMILIES = {
    "LlamaForCausalLM": Family(
        model_type="llama",
        max_position_embeddings=2048,
        num_key_value_heads=None,
        head_dim=None,
        reads_attention_bias=True,
        reads_mlp_bias=True,
        sliding_window=None,
        slides="in the cache",
    ),
    "Qwen2ForCausalLM": Family(
        model_type="qwen2",
        max_position_embeddings=32768,
        num_key_value_heads=32,
        head_dim=None,
        reads_attention_bias=False,
        reads_mlp_bias=False,
        sliding_window=4096,
        slides="by choice",
    ),
    "Qwen3ForCausalLM": Family(
        model_type="qwen3",
        max_position_embeddings=32768,
        num_key_value_heads=32,
        head_dim=128,
        reads_attention_bias=True,
        reads_mlp_bias=False,
        sliding_window=4096,
        slides="by choice",
    ),
    "MistralForCausalLM": Family(
        model_type="mistral",
        max_position_embeddings=131072,
        num_key_value_heads=8,
        head_dim=None,
        reads_attention_bias=False,
        reads_mlp_bias=False,
        sliding_window=4096,
        slides="everywhere",
    ),
}


@dataclass(frozen=True)
class ModelConfig:
    """The facts of a checkpoint's config.json that the supported families need, under its names where it has them.

    Read as plain JSON rather than through transformers, whose import alone takes longer than starting an engine.
    Both spellings of the rotary options are understood: `rope_theta` + `rope_scaling`, and `rope_parameters`.

    Attributes:
        max_position_embeddings: config.json's, or as many as its rope stretches these to.
        rope: the rotary embedding of all layers, or of those that attend to everything.
        local_rope: that of the layers with a window, None: the same.
        attention_bias, mlp_bias: False in a family that does not read them.
        sliding_window: the window of the layers that have one; None where all attend to everything.
        eos_token_ids: those of config.json and of generation_config.json.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: Rope
    local_rope: Rope | None
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    sliding_window: int | None
    dtype: str
    eos_token_ids: frozenset[int]

    @classmethod
    def from_folder(
        cls, folder: str, overrides: dict[str, Any] | None = None, generation_folder: str | None = None
    ) -> "ModelConfig":
        """Reads config.json and the EOS ids of generation_config.json, the folder's or that of `generation_folder`.

        `overrides` are keys of config.json with other values.

        Raises:
            ValueError: no config.json, a damaged one, a key that is missing or of a wrong type, or one that asks for
                what no layer here does.
        """
        path = os.path.join(folder, "config.json")
        generation_path = os.path.join(generation_folder or folder, "generation_config.json")
        if not os.path.isfile(path):
            raise ValueError(f"model={folder!r} has no config.json")
        raw = read_object(path)
        if overrides is not None:
            path, raw = f"{path} with hf_overrides={overrides!r}", override(raw, overrides)
        facts = Facts(path, raw)
        generation = Facts(generation_path, read_object(generation_path))
        architecture, family = facts.family()
        facts.refuse_unsupported(family)
        num_layers, heads = facts.size("num_hidden_layers"), facts.size("num_attention_heads")
        hidden_size = facts.size("hidden_size")
        head_dim = facts.head_dim(family, hidden_size // heads)
        positions = facts.size("max_position_embeddings", family.max_position_embeddings)
        rope, local_rope = facts.ropes(family, head_dim, positions)
        if not family.has_local_rope:  # Gemma 3's number is that of the stretched positions
            positions = rope.max_positions(positions)
        return cls(
            architecture=architecture,
            vocab_size=facts.size("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=facts.size("intermediate_size"),
            num_hidden_layers=num_layers,
            num_attention_heads=heads,
            num_key_value_heads=facts.num_key_value_heads(family, heads),
            head_dim=head_dim,
            max_position_embeddings=positions,
            rms_norm_eps=facts.number("rms_norm_eps", facts.raw.get("rms_norm_eps", 1e-6)),
            rope=rope,
            local_rope=local_rope,
            tie_word_embeddings=facts.flag("tie_word_embeddings"),
            attention_bias=family.reads_attention_bias and facts.flag("attention_bias"),
            mlp_bias=family.reads_mlp_bias and facts.flag("mlp_bias"),
            sliding_window=facts.sliding_window(family, num_layers),
            dtype=facts.dtype(),
            eos_token_ids=facts.eos_token_ids() | generation.eos_token_ids(),
        )


def override(raw: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """The object of config.json with other values for some keys, in whichever of two spellings either has them.

    Raises:
        TypeError, ValueError: `overrides`, the option hf_overrides, is no dict of keys.
    """
    if callable(overrides):
        reason = "config.json is read without the object that a function would change"
        raise ValueError(f"hf_overrides must be a dict of config.json's keys, got {overrides!r}: {reason}")
    if not isinstance(overrides, dict) or not all(isinstance(key, str) for key in overrides):
        raise TypeError(f"hf_overrides must be a dict of config.json's keys, got {overrides!r}")
    changed = with_outer_thetas(raw)  # so that they are keys, and stay
    for spellings in (ROPE_KEYS, DTYPE_KEYS):
        if any(key in overrides for key in spellings):
            changed = {key: value for key, value in changed.items() if key not in spellings}
    return changed | overrides


class Facts(JsonFacts):
    """The object of config.json, or of generation_config.json."""

    def family(self) -> tuple[str, Family]:
        """The architecture, and what is particular to it."""
        architectures = self.raw.get("architectures")
        if not isinstance(architectures, list) or not architectures or not isinstance(architectures[0], str):
            raise self.error(f"architectures must be a list that names the model's class, got {architectures!r}")
        architecture = architectures[0]
        if architecture not in FAMILIES:
            raise self.error(f"architectures={architectures!r} is not supported, only {', '.join(FAMILIES)}")
        family = FAMILIES[architecture]
        if (model_type := self.raw.get("model_type", family.model_type)) != family.model_type:
            expected = f"that of {architecture} is {family.model_type!r}"
            raise self.error(f"model_type={model_type!r} contradicts architectures: {expected}")
        return architecture, family

    def refuse_unsupported(self, family: Family) -> None:
        """Raises for the first fact that asks for what no layer here does."""
        for key in REFUSED:
            if self.raw.get(key):
                raise self.error(f"{key}={self.raw[key]!r} is not supported")
        if (activation := self.raw.get("hidden_act", "silu")) not in ACTIVATIONS:
            raise self.error(f"hidden_act={activation!r} is not supported, only {' or '.join(ACTIVATIONS)}")
        if not self.raw.get("is_causal", True):
            raise self.error(f"is_causal={self.raw['is_causal']!r} is not supported, only true")
        # transformers 5 reads it for the KV cache, where the family has no way to say what each layer attends to.
        if (size := self.raw.get("attention_chunk_size")) is not None and family.slides != "by choice":
            raise self.error(f"attention_chunk_size={size!r} is not supported")

    def num_key_value_heads(self, family: Family, heads: int) -> int:
        """null, unlike no key, is num_attention_heads in every family."""
        if self.raw.get("num_key_value_heads", family.num_key_value_heads) is None:
            return heads
        value = self.size("num_key_value_heads", family.num_key_value_heads)
        if heads % value:
            raise self.error(f"num_key_value_heads={value} must divide num_attention_heads={heads}")
        return value

    def head_dim(self, family: Family, quotient: int) -> int:
        """null is `quotient`, hidden_size // num_attention_heads, in the families where no key is."""
        is_quotient = family.head_dim is None and self.raw.get("head_dim") is None
        value = quotient if is_quotient else self.size("head_dim", family.head_dim)
        if value == 0 or value % 2 or value > 256:
            raise self.error(f"head_dim must be even and between 2 and 256, got {value}")
        return value

    def ropes(self, family: Family, head_dim: int, positions: int) -> tuple[Rope, Rope | None]:
        """The rotary embedding, and that of the layers with a window if it is another one."""
        theta, share = family.rope_theta, family.partial_rotary_factor
        return read_ropes(self, head_dim, positions, theta, share, family.has_local_rope)

    def sliding_window(self, family: Family, num_layers: int) -> int | None:
        """The window of the layers that have one, None where none has."""
        is_switched_off = family.slides == "by choice" and not self.flag("use_sliding_window")
        window = None if is_switched_off else self.raw.get("sliding_window", family.sliding_window)
        layer_types = self._layer_types(num_layers)
        if window is None:
            if SLIDING in layer_types:
                raise self.error(f"layer_types names {SLIDING!r}, but there is no sliding_window that is in use")
            return None
        window = self.size("sliding_window", family.sliding_window)
        if family.slides == "everywhere":
            return window
        if layer_types:
            return window if SLIDING in layer_types else None
        if family.slides == "in the cache":
            return window
        first = self.raw.get("max_window_layers", DEFAULT_MAX_WINDOW_LAYERS)
        if not isinstance(first, int) or isinstance(first, bool):
            raise self.error(f"max_window_layers must be an integer, got {first!r}")
        return window if first < num_layers else None

    def _layer_types(self, num_layers: int) -> list[str]:
        layer_types = self.raw.get("layer_types")
        if layer_types is None:
            return []
        if not isinstance(layer_types, list) or len(layer_types) != num_layers:
            raise self.error(f"layer_types must list num_hidden_layers={num_layers} names, got {layer_types!r}")
        for name in layer_types:
            if not isinstance(name, str) or name not in LAYER_TYPES:
                raise self.error(f"layer_types with {name!r} is not supported, only {' and '.join(LAYER_TYPES)}")
        return [LAYER_TYPES[name] for name in layer_types]

    def dtype(self) -> str:
        """The dtype's name, under its newer or older key."""
        key = "torch_dtype" if self.raw.get("dtype") is None else "dtype"
        value = self.raw.get(key)
        if value is not None and not isinstance(value, str):
            raise self.error(f"{key} must be a string, got {value!r}")
        return value or "float32"

    def eos_token_ids(self) -> frozenset[int]:
        """One id, a list of them, or none."""
        value = self.raw.get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        for token_id in ids:
            if not isinstance(token_id, int) or isinstance(token_id, bool):
                raise self.error(f"eos_token_id must be an integer or a list of them, got {value!r}")
        return frozenset(ids)
