"""Which layers attend to the last tokens only, and which do not rotate. Knows nothing of how."""

from nanovllm.checkpoint.facts import JsonFacts
from nanovllm.checkpoint.families import Family
from nanovllm.checkpoint.rope import FULL, SLIDING

LAYER_TYPES = {FULL: FULL, SLIDING: SLIDING, "attention": FULL}  # the last is an older name
IF_ASKED = ("if asked", "from a layer on", "every other", "without rope")  # by use_sliding_window
DEFAULT_PATTERN = 2  # and the only one of a family that does not read sliding_window_pattern


def unrotated_layers(facts: JsonFacts, family: Family, num_layers: int) -> frozenset[int]:
    """The layers whose queries and keys do not rotate."""
    if "no_rope_layers" not in family.reads:
        return frozenset()
    layers = facts.raw.get("no_rope_layers")  # 1 where they do
    if layers is None:
        interval = facts.size("no_rope_layer_interval")
        return frozenset(range(interval - 1, num_layers, interval))
    if not isinstance(layers, list) or len(layers) < num_layers or any(layer not in (0, 1) for layer in layers):
        raise facts.error(f"no_rope_layers must list num_hidden_layers={num_layers} zeros and ones, got {layers!r}")
    return frozenset(index for index in range(num_layers) if not layers[index])


def layer_windows(
    facts: JsonFacts, family: Family, num_layers: int, unrotated: frozenset[int]
) -> tuple[int | None, ...]:
    """The sliding window of each layer, in tokens, its own among them; None: it attends to everything.

    `unrotated` are the layers whose queries and keys do not rotate.
    """
    is_off = family.slides in IF_ASKED and not facts.flag("use_sliding_window")
    layer_types = _layer_types(facts, num_layers)
    if is_off or facts.raw.get("sliding_window") is None:
        if SLIDING in layer_types:
            raise facts.error(f"layer_types names {SLIDING!r}, but there is no sliding_window that is in use")
        if layer_types or family.slides != "by pattern":  # where layers slide that nobody names, null is an error
            return (None,) * num_layers
    window = facts.size("sliding_window")
    layers = range(num_layers)
    if family.slides in ("always", "if asked"):
        slides = [True] * num_layers
    elif layer_types:
        slides = [layer_type == SLIDING for layer_type in layer_types]
    elif family.slides == "by pattern":
        key = "sliding_window_pattern"
        pattern = facts.size(key, DEFAULT_PATTERN) if key in family.reads else DEFAULT_PATTERN
        slides = [(layer + 1) % pattern != 0 for layer in layers]
    elif family.slides == "without rope":
        slides = [layer in unrotated for layer in layers]
    elif family.slides in ("everywhere", "in the cache"):
        slides = [True] * num_layers
    else:
        border = facts.raw.get("max_window_layers")
        if not isinstance(border, int) or isinstance(border, bool):
            raise facts.error(f"max_window_layers must be an integer, got {border!r}")
        if family.slides == "every other":
            slides = [layer % 2 == 0 and layer < border for layer in layers]
        else:
            slides = [layer >= border for layer in layers]
    return tuple(window if is_sliding else None for is_sliding in slides)


def _layer_types(facts: JsonFacts, num_layers: int) -> list[str]:
    layer_types = facts.raw.get("layer_types")
    if layer_types is None:
        return []
    if not isinstance(layer_types, list) or len(layer_types) != num_layers:
        raise facts.error(f"layer_types must list num_hidden_layers={num_layers} names, got {layer_types!r}")
    for name in layer_types:
        if not isinstance(name, str) or name not in LAYER_TYPES:
            raise facts.error(f"layer_types with {name!r} is not supported, only {' and '.join(LAYER_TYPES)}")
    return [LAYER_TYPES[name] for name in layer_types]
