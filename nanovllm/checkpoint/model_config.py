"""The facts of a checkpoint's config.json, read and validated in one place.

The rule: a fact that changes what the model computes is honoured, or refused by its name and value; one that cannot
change it is passed over. tests/test_config_facts.py settles every field of transformers' config classes by it.

Where a key is absent, the default of the family's config class in transformers counts, or the absence is refused.
"""

import os
from dataclasses import dataclass, field
from typing import Any

from nanovllm.checkpoint.facts import JsonFacts
from nanovllm.checkpoint.families import FAMILIES, MULTIPLIERS, TEXT_KEY, Family
from nanovllm.checkpoint.files import read_object
from nanovllm.checkpoint.gguf.config import read_gguf_config
from nanovllm.checkpoint.gguf.files import is_gguf
from nanovllm.checkpoint.rope import OLDER_NAMES, ORIGINAL, ROPE_KEYS, Rope, read_ropes, with_outer_thetas
from nanovllm.checkpoint.windows import layer_windows, unrotated_layers
from nanovllm.experts.mixture import Mixture, read_mixture

# What no layer here does, or what would have transformers read other files. Empty values say nothing.
REFUSED = (
    "pruned_heads",
    "per_layer_config",
    "kv_sharing_modes",
    "transformers_weights",
    "configuration_files",
    "use_bidirectional_attention",
)
OTHER_ACTIVATIONS = {"swish": "silu"}  # two names of one function
QUANTIZATION_KEYS = ("quantization_config", "compression_config")  # the second is an older name of the first
DTYPE_KEYS = ("torch_dtype", "dtype")  # two spellings of one key
# What stands outside of the object that says how a model of more than text computes text.
OUTER_KEYS = ("architectures", "eos_token_id", "tie_word_embeddings", *DTYPE_KEYS, *QUANTIZATION_KEYS, *REFUSED)


@dataclass(frozen=True)
class ModelConfig:
    """The facts of a checkpoint's config.json that the supported families need, under its names where it has them.

    Read as plain JSON rather than through transformers, whose import alone takes longer than starting an engine.
    Both spellings of the rotary options are understood: `rope_theta` + `rope_scaling`, and `rope_parameters`.

    Attributes:
        max_position_embeddings: config.json's, or as many as its rope stretches these to.
        rope: the rotary embedding of all layers, or of those that attend to everything.
        local_rope: that of the layers with a window, None: the same.
        attention_bias, mlp_bias, qkv_bias: False in a family that does not read them.
        attention_scale: of queries times keys; None: head_dim ** -0.5.
        attn_logit_softcapping, final_logit_softcapping: soft caps of scores and of logits; None: there is none.
        layer_windows: of each layer the tokens that it attends to, the last ones; None: to all.
        mixture: the experts of the sparse layers; None: there are none.
        eos_token_ids: those of config.json and of generation_config.json.
        quantization_config: how weights are stored, for `quantization.read_method`; {}: as they are.
        unrotated_layers: those whose queries and keys do not rotate.
        embedding_multiplier, residual_multiplier, logits_scaling: Granite's: of the embeddings, of what a layer adds
            to the residual stream, and what logits are divided by.
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
    qkv_bias: bool
    attention_scale: float | None
    attn_logit_softcapping: float | None
    final_logit_softcapping: float | None
    layer_windows: tuple[int | None, ...]
    mixture: Mixture | None
    dtype: str
    eos_token_ids: frozenset[int]
    quantization_config: dict[str, Any] = field(default_factory=dict, hash=False)
    unrotated_layers: frozenset[int] = frozenset()
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0

    @classmethod
    def from_folder(
        cls, folder: str, overrides: dict[str, Any] | None = None, generation_folder: str | None = None
    ) -> "ModelConfig":
        """Reads config.json and the EOS ids of generation_config.json, the folder's or that of `generation_folder`.

        `overrides` are keys of config.json with other values. Of a GGUF file in place of the folder, its metadata are
        what config.json would say.

        Raises:
            ValueError: no config.json, a damaged one, a key that is missing or of a wrong type, or one that asks for
                what no layer here does.
        """
        path = folder if is_gguf(folder) else os.path.join(folder, "config.json")
        generation_path = os.path.join(generation_folder or folder, "generation_config.json")
        if not os.path.isfile(path):
            is_adapter = os.path.isfile(os.path.join(folder, "adapter_config.json"))
            reason = "; an adapter is not supported, merge it into its model" if is_adapter else ""
            raise ValueError(f"model={folder!r} has no config.json{reason}")
        raw = read_gguf_config(path) if is_gguf(path) else read_object(path)
        if overrides is not None:
            path, raw = f"{path} with hf_overrides={overrides!r}", override(raw, overrides)
        generation = Facts(generation_path, read_object(generation_path))
        architecture, family, facts = Facts(path, raw).family()
        facts.refuse_unsupported(family)
        num_layers, heads = facts.size("num_hidden_layers"), facts.size("num_attention_heads")
        hidden_size = facts.size("hidden_size")
        head_dim = facts.head_dim(family, hidden_size // heads)
        positions = facts.size("max_position_embeddings")
        rope, local_rope = facts.ropes(family, head_dim, positions)
        if not family.has_local_rope:  # Gemma 3's number is that of the stretched positions
            positions = rope.max_positions(positions)
        positions = facts.unchunked(positions)
        unrotated = unrotated_layers(facts, family, num_layers)
        windows = layer_windows(facts, family, num_layers, unrotated)
        if family.slides == "in the cache" and any(windows):
            positions, windows = min(positions, *filter(None, windows)), (None,) * num_layers
        return cls(
            architecture=architecture,
            vocab_size=facts.size("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=facts.size("intermediate_size"),
            num_hidden_layers=num_layers,
            num_attention_heads=heads,
            num_key_value_heads=facts.num_key_value_heads(heads),
            head_dim=head_dim,
            max_position_embeddings=positions,
            rms_norm_eps=facts.number("rms_norm_eps", facts.raw.get("rms_norm_eps", 1e-6)),
            rope=rope,
            local_rope=local_rope,
            tie_word_embeddings=facts.flag("tie_word_embeddings"),
            attention_bias="attention_bias" in family.reads and facts.flag("attention_bias"),
            mlp_bias="mlp_bias" in family.reads and facts.flag("mlp_bias"),
            qkv_bias="qkv_bias" in family.reads and facts.flag("qkv_bias"),
            attention_scale=facts.attention_scale(family),
            attn_logit_softcapping=facts.soft_cap(family, "attn_logit_softcapping"),
            final_logit_softcapping=facts.soft_cap(family, "final_logit_softcapping"),
            layer_windows=windows,
            mixture=read_mixture(facts, family, num_layers),
            dtype=facts.dtype(),
            eos_token_ids=facts.eos_token_ids() | generation.eos_token_ids(),
            quantization_config=facts.quantization_config(),
            unrotated_layers=unrotated,
            **{key: facts.number(key, facts.raw.get(key, 1.0)) for key in MULTIPLIERS & family.reads},
        )

    @property
    def layer_ropes(self) -> tuple[Rope | None, ...]:
        """The rotary embedding of each layer; None: its queries and keys do not rotate."""
        sliding = self.rope if self.local_rope is None else self.local_rope
        ropes = [sliding if window else self.rope for window in self.layer_windows]
        return tuple(None if layer in self.unrotated_layers else rope for layer, rope in enumerate(ropes))


def override(raw: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """The object of config.json with other values for some keys, in whichever of two spellings either has them.

    Keys of an object TEXT_KEY may be given as they are, or in such an object.

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
    changed = changed | overrides
    if isinstance(raw.get(TEXT_KEY), dict):
        others = {key: value for key, value in overrides.items() if key != TEXT_KEY}
        changed[TEXT_KEY] = override(raw[TEXT_KEY], others | (overrides.get(TEXT_KEY) or {}))
    return changed


class Facts(JsonFacts):
    """The object of config.json, or of generation_config.json."""

    def family(self) -> tuple[str, Family, "Facts"]:
        """The architecture, what is particular to it, and the facts of its text, the family's defaults among them."""
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
        raw = self.raw
        if family.text_key is not None:
            if not isinstance(raw.get(family.text_key), dict):
                raise self.error(f"{family.text_key} must be an object, got {raw.get(family.text_key)!r}")
            outer = {key: raw[key] for key in OUTER_KEYS if raw.get(key) is not None}
            raw = raw[family.text_key] | outer
        return architecture, family, Facts(self.path, family.defaults | raw)

    def refuse_unsupported(self, family: Family) -> None:
        """Raises for the first fact that asks for what no layer here does."""
        for key in REFUSED:
            if self.raw.get(key):
                raise self.error(f"{key}={self.raw[key]!r} is not supported")
        key, known = family.activation_key, family.activation
        if (activation := self.raw.get(key, known)) != known and OTHER_ACTIVATIONS.get(activation) != known:
            raise self.error(f"{key}={activation!r} is not supported, only {known!r}")
        if not self.raw.get("is_causal", True):
            raise self.error(f"is_causal={self.raw['is_causal']!r} is not supported, only true")
        # transformers 5 reads it for the KV cache, where the family has no way to say what each layer attends to.
        is_read = family.slides in ("in the cache", "everywhere", "always", "if asked")
        if is_read and (size := self.raw.get("attention_chunk_size")) is not None:
            raise self.error(f"attention_chunk_size={size!r} is not supported")

    def num_key_value_heads(self, heads: int) -> int:
        """null is num_attention_heads in every family, and so is no key in those without a default."""
        if self.raw.get("num_key_value_heads") is None:
            return heads
        value = self.size("num_key_value_heads")
        if heads % value:
            raise self.error(f"num_key_value_heads={value} must divide num_attention_heads={heads}")
        return value

    def head_dim(self, family: Family, quotient: int) -> int:
        """null is `quotient`, hidden_size // num_attention_heads, in the families where no key is."""
        is_quotient = "head_dim" not in family.defaults and self.raw.get("head_dim") is None
        value = quotient if is_quotient else self.size("head_dim")
        if value == 0 or value % 2 or value > 256:
            raise self.error(f"head_dim must be even and between 2 and 256, got {value}")
        return value

    def ropes(self, family: Family, head_dim: int, positions: int) -> tuple[Rope, Rope | None]:
        """The rotary embedding, and that of the layers with a window if it is another one."""
        theta, share = family.rope_theta, family.partial_rotary_factor
        names = OLDER_NAMES | family.rope_names
        return read_ropes(self, head_dim, positions, theta, share, family.has_local_rope, names)

    def unchunked(self, positions: int) -> int:
        """Those of the positions that Qwen2.5-1M computes as all models do: beyond, it attends to remapped chunks."""
        key = "dual_chunk_attention_config"
        chunks = self.raw.get(key) or {}
        if not isinstance(chunks, dict):
            raise self.error(f"{key} must be an object, got {chunks!r}")
        return min(positions, JsonFacts(f"{key} of {self.path}", chunks).size(ORIGINAL)) if chunks else positions

    def attention_scale(self, family: Family) -> float | None:
        """What queries times keys are multiplied by, if it does not follow from head_dim."""
        if "attention_multiplier" in family.reads:
            return self.number("attention_multiplier", self.raw.get("attention_multiplier", 1.0))
        key = "query_pre_attn_scalar"
        return self.number(key, self.raw.get(key)) ** -0.5 if key in family.reads else None

    def soft_cap(self, family: Family, key: str) -> float | None:
        """A positive number; null is no cap."""
        is_none = key not in family.reads or self.raw.get(key) is None
        return None if is_none else self.number(key, self.raw[key])

    def dtype(self) -> str:
        """The dtype's name, under its newer or older key."""
        key = "torch_dtype" if self.raw.get("dtype") is None else "dtype"
        value = self.raw.get(key)
        if value is not None and not isinstance(value, str):
            raise self.error(f"{key} must be a string, got {value!r}")
        return value or "float32"

    def quantization_config(self) -> dict[str, Any]:
        """The object that says how weights are stored, under either name; {}: as they are."""
        for key in QUANTIZATION_KEYS:
            value = self.raw.get(key) or {}
            if not isinstance(value, dict):
                raise self.error(f"{key} must be an object, got {value!r}")
            if value:
                return value
        return {}

    def eos_token_ids(self) -> frozenset[int]:
        """One id, a list of them, or none."""
        value = self.raw.get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        for token_id in ids:
            if not isinstance(token_id, int) or isinstance(token_id, bool):
                raise self.error(f"eos_token_id must be an integer or a list of them, got {value!r}")
        return frozenset(ids)
