"""The rotary embedding that config.json asks for: how positions beyond those of the training are brought within.

Both spellings are read, `rope_theta` + `rope_scaling` and `rope_parameters`. Where they disagree, or versions of
transformers do, transformers 5 is right. This file knows nothing of angles: layers/rotary_embedding.py does, and
rope_scaling/.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from nanovllm.checkpoint.facts import JsonFacts

Kind = Literal["default", "linear", "dynamic", "yarn", "longrope", "llama3"]
OLDER_NAMES = {"su": "longrope"}
ROPE_KEYS = ("rope_parameters", "rope_scaling")  # two spellings of one key
LAYER_TYPES = FULL, SLIDING = "full_attention", "sliding_attention"
OUTER_THETA = {FULL: "rope_theta", SLIDING: "rope_local_base_freq"}  # what theta is called outside of such an object
ORIGINAL = "original_max_position_embeddings"
DEFAULT_ROPE_THETA = 10000.0
DEFAULT_LOCAL_THETA = 10000.0
DEFAULT_BETA_FAST, DEFAULT_BETA_SLOW = 32.0, 1.0


@dataclass(frozen=True)
class Rope:
    """The rotary embedding of some layers. A number that its kind does not have is at its default.

    Attributes:
        theta: the base of the frequencies.
        share: how much of a head rotates, its first dimensions; config.json's `partial_rotary_factor`.
        factor: how many times more positions there are than the model was trained with.
        original_max_position_embeddings: those it was trained with.
        attention_factor: what cosines and sines are multiplied by.
        low_freq_factor, high_freq_factor: of "llama3".
        beta_fast, beta_slow, truncate: of "yarn".
        short_factor, long_factor: of "longrope", a number for each pair of dimensions.
    """

    kind: Kind
    theta: float
    share: float = 1.0
    factor: float = 1.0
    original_max_position_embeddings: float = 0.0
    attention_factor: float = 1.0
    low_freq_factor: float = 0.0
    high_freq_factor: float = 0.0
    beta_fast: float = 0.0
    beta_slow: float = 0.0
    truncate: bool = False
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    def rotary_dim(self, head_dim: int) -> int:
        """How many dimensions of a head rotate."""
        return int(head_dim * self.share)

    def max_positions(self, given: int) -> int:
        """The positions of a model whose config.json says `given`, which for some kinds are those of the training."""
        if self.kind in ("linear", "dynamic", "yarn"):
            return max(given, int(self.original_max_position_embeddings * self.factor))
        return given


def read_ropes(
    facts: JsonFacts,
    head_dim: int,
    max_positions: int,
    theta: float = DEFAULT_ROPE_THETA,
    share: float | None = None,
    has_local_rope: bool = False,
    names: Mapping[str, str] = OLDER_NAMES,
) -> tuple[Rope, Rope | None]:
    """The rope of a model's layers, and that of its sliding layers if it is another one.

    Args:
        facts: of config.json.
        head_dim: dimensions of a head.
        max_positions: max_position_embeddings of config.json.
        theta: the family's default.
        share: the family's default of `partial_rotary_factor`; None: a family that rotates whole heads.
        has_local_rope: whether the family's sliding layers have a rope of their own (Gemma 3): an object inside of
            `rope_parameters`, or `rope_local_base_freq` as the theta of a rope without scaling.
        names: of kinds, other than their own.
    """
    key = "rope_scaling" if facts.raw.get("rope_scaling") else "rope_parameters"
    given = facts.raw.get(key) or {}
    if not isinstance(given, dict):
        raise facts.error(f"{key} must be an object, got {given!r}")
    of_types = [name for name in given if name in LAYER_TYPES or isinstance(given[name], dict)]
    if of_types and not (has_local_rope and all(name in LAYER_TYPES for name in given)):
        name = of_types[0]
        raise facts.error(f"{key} of a layer type, here {name}={given[name]!r}, is not supported")
    if has_local_rope and key == "rope_parameters" and given and not of_types:
        # transformers 5 reads nothing of it.
        raise facts.error(f"{key} must have an object for each of {' and '.join(LAYER_TYPES)}, got {given!r}")

    def read(layer_type: str, theta: float) -> Rope:
        if of_types:
            name, mine = f"{key}'s {layer_type}", given.get(layer_type) or {}
        else:  # one object, of the layers that attend to everything
            name, mine = key, given if layer_type == FULL else {}
        if not isinstance(mine, dict):
            raise facts.error(f"{name} must be an object, got {mine!r}")
        return RopeFacts(facts, name, mine, head_dim, max_positions, share, names).rope(OUTER_THETA[layer_type], theta)

    rope = read(FULL, theta)
    if not has_local_rope:
        return rope, None
    other = facts.raw.get("rope_parameters")
    if key == "rope_scaling" and isinstance(other, dict) and any(name in other for name in LAYER_TYPES):
        raise facts.error(f"rope_scaling={given!r} contradicts rope_parameters of layer types, {other!r}")
    local_rope = read(SLIDING, DEFAULT_LOCAL_THETA)
    return rope, None if local_rope == rope else local_rope


def with_outer_thetas(raw: dict[str, Any]) -> dict[str, Any]:
    """The same config.json with every theta outside of the rotary objects, where it is one key."""
    key = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    given = raw.get(key)
    if not isinstance(given, dict):
        return raw
    thetas, objects = {}, {}
    for layer_type, theta_key in OUTER_THETA.items():
        if isinstance(mine := given.get(layer_type), dict):
            objects[layer_type] = {name: value for name, value in mine.items() if name != "rope_theta"}
            thetas |= {theta_key: mine["rope_theta"]} if "rope_theta" in mine else {}
    if "rope_theta" in given:
        thetas["rope_theta"] = given["rope_theta"]
    return raw | thetas | {key: {name: value for name, value in (given | objects).items() if name != "rope_theta"}}


@dataclass(frozen=True)
class RopeFacts:
    """One rotary object of config.json; its methods raise a ValueError as those of JsonFacts do.

    Attributes:
        facts, head_dim, max_positions, share, names: see read_ropes.
        key: what errors call the object.
        given: the object.
    """

    facts: JsonFacts
    key: str
    given: dict[str, Any]
    head_dim: int
    max_positions: int
    share: float | None
    names: Mapping[str, str]

    def rope(self, theta_key: str, default_theta: float) -> Rope:
        """The whole of it; theta_key is what theta is called outside of the object."""
        kind, share = self._kind(), self._share()
        theta_key = "rope_theta" if "rope_theta" in self.given else theta_key
        theta = self.facts.number(theta_key, (self.facts.raw | self.given).get(theta_key, default_theta))
        pairs = int(self.head_dim * share) // 2
        numbers: dict[str, Any] = {}
        if kind in ("linear", "dynamic"):
            numbers = {"factor": self._number("factor"), ORIGINAL: float(self.max_positions)}
        elif kind == "yarn":
            numbers = self._yarn()
        elif kind == "longrope":
            numbers = self._longrope(pairs)
        elif kind == "llama3":
            numbers = self._llama3()
        if kind == "dynamic" and pairs == 1:
            raise self._error("of type 'dynamic' needs more than the 2 dimensions that rotate here")
        if kind == "yarn" and theta <= 1:
            raise self._error(f"of type 'yarn' needs a rope_theta above 1, got {theta}")
        return Rope(kind, theta, share, **numbers)

    def _error(self, text: str) -> ValueError:
        return self.facts.error(f"{self.key} {text}")

    def _number(self, name: str, default: float | None = None) -> float:
        """A positive number; null is as good as none, and refused where there is no default."""
        if default is None and name not in self.given:
            raise self._error(f"of type {self._kind()!r} has no {name!r}")
        value = self.given.get(name)
        return self.facts.number(f"{self.key}'s {name}", default if value is None else value)

    def _kind(self) -> Kind:
        types = [self.given[name] for name in ("rope_type", "type") if name in self.given] or ["default"]
        kinds = [self.names.get(name, name) if isinstance(name, str) else name for name in types]
        if kinds[0] not in get_args(Kind) or kinds[0] != kinds[-1]:
            known = ", ".join(get_args(Kind))
            raise self._error(f"of type {' and '.join(map(repr, types))} is not supported, only one of {known}")
        return kinds[0]

    def _share(self) -> float:
        name = "partial_rotary_factor"
        shares = [source[name] for source in (self.given, self.facts.raw) if source.get(name) is not None]
        if self.share is None:
            if other := [share for share in shares if share != 1]:
                raise self.facts.error(f"{name}={other[0]!r} is not supported, only 1")
            return 1.0
        share = self.facts.number(name, shares[0] if shares else self.share)
        rotary_dim = int(self.head_dim * share)
        if share > 1 or rotary_dim < 2 or rotary_dim % 2:
            limits = f"must leave an even number of head_dim={self.head_dim} dimensions, 2 or more, and be at most 1"
            raise self.facts.error(f"{name}={share} {limits}")
        return share

    def _original(self, default: float | None = None) -> float:
        """The positions of the training, which may stand outside of the object."""
        outside = self.facts.raw.get(ORIGINAL)
        if ORIGINAL not in self.facts.raw:
            return self._number(ORIGINAL, default)
        inside = self.given.get(ORIGINAL, outside)
        if inside != outside:
            # transformers 4 takes the inner one, 5 the outer one.
            raise self.facts.error(f"{ORIGINAL}={outside!r} contradicts that of {self.key}, {inside!r}")
        return self.facts.number(ORIGINAL, outside)

    def _yarn(self) -> dict[str, Any]:
        """transformers before 5 took max_position_embeddings / original_max_position_embeddings for the factor."""
        factor = self._number("factor")
        fast, slow = self._number("beta_fast", DEFAULT_BETA_FAST), self._number("beta_slow", DEFAULT_BETA_SLOW)
        if fast < slow:
            raise self._error(f"has beta_fast={fast}, which must not be below its beta_slow={slow}")
        truncate = self.given.get("truncate", True)
        if not isinstance(truncate, bool):
            raise self._error(f"has truncate={truncate!r}, which must be true or false")
        # Zero says as much as null: that there is none. One alone does not count.
        names = ("mscale", "mscale_all_dim")
        scales = [self._number(name) if self.given.get(name) not in (None, 0) else 0.0 for name in names]
        above, below = scales if all(scales) else (1.0, 0.0)
        attention_factor = yarn_scale(factor, above) / yarn_scale(factor, below)
        return {
            "factor": factor,
            ORIGINAL: self._original(float(self.max_positions)),
            "attention_factor": self._number("attention_factor", attention_factor),
            "beta_fast": fast,
            "beta_slow": slow,
            "truncate": truncate,
        }

    def _longrope(self, pairs: int) -> dict[str, Any]:
        original = self._original()
        if original <= 1:
            raise self._error(f"of type 'longrope' needs {ORIGINAL} above 1, got {original}")
        factor = self._number("factor", self.max_positions / original)
        attention_factor = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        return {
            "factor": factor,
            ORIGINAL: original,
            "attention_factor": self._number("attention_factor", attention_factor),
            "short_factor": self._numbers("short_factor", pairs),
            "long_factor": self._numbers("long_factor", pairs),
        }

    def _numbers(self, name: str, count: int) -> tuple[float, ...]:
        """A list of positive numbers, one for each pair of dimensions that rotates."""
        if name not in self.given:
            raise self._error(f"of type {self._kind()!r} has no {name!r}")
        values = self.given[name]
        if not isinstance(values, list) or len(values) != count:
            got = f"a list of {len(values)}" if isinstance(values, list) else repr(values)
            raise self._error(f"must have a list of {count} numbers as {name}, got {got}")
        return tuple(self.facts.number(f"{self.key}'s {name}[{i}]", value) for i, value in enumerate(values))

    def _llama3(self) -> dict[str, Any]:
        factor, low, high = map(self._number, ("factor", "low_freq_factor", "high_freq_factor"))
        if high <= low:
            raise self.facts.error(f"{self.key}'s high_freq_factor={high} must be above its low_freq_factor={low}")
        return {"factor": factor, ORIGINAL: self._original(), "low_freq_factor": low, "high_freq_factor": high}


def yarn_scale(factor: float, weight: float) -> float:
    """What queries and keys grow by so that attention stays as sharp over `factor` times as many positions.

    With weight 1 the square root of 1 / t of the YaRN paper (arXiv 2309.00071, section 3.4).
    """
    return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0
