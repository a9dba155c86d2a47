"""Which layers have a mixture of experts, and what of. Knows nothing of how they are computed."""

from dataclasses import dataclass

from nanovllm.checkpoint.facts import JsonFacts
from nanovllm.checkpoint.families import Family

COUNT_KEYS = ("num_experts", "num_local_experts")  # two spellings of one key


@dataclass(frozen=True)
class Mixture:
    """The experts of a model's sparse layers.

    Attributes:
        layers: those that have experts in place of an MLP.
        num_experts_per_tok: how many of num_experts compute a token.
        intermediate_size: of an expert.
        shared_intermediate_size: of the expert that computes all tokens besides, 0: there is none.
        norm_topk_prob: whether the weights of a token's experts sum to 1.
    """

    layers: frozenset[int]
    num_experts: int
    num_experts_per_tok: int
    intermediate_size: int
    shared_intermediate_size: int
    norm_topk_prob: bool


def read_mixture(facts: JsonFacts, family: Family, num_layers: int) -> Mixture | None:
    """The mixture of config.json; None: the family has none, or no layer has."""
    if family.num_experts is None:
        return None
    given = [key for key in COUNT_KEYS if key in facts.raw] or COUNT_KEYS[:1]
    counts = [facts.size(key, family.num_experts) for key in given]
    if counts[0] != counts[-1]:
        raise facts.error(f"num_experts={counts[0]} contradicts num_local_experts={counts[-1]}")
    top_k = facts.size("num_experts_per_tok")
    if top_k > counts[0]:
        raise facts.error(f"num_experts_per_tok={top_k} must be at most num_experts={counts[0]}")
    layers = frozenset(range(num_layers))
    if "decoder_sparse_step" in family.reads:
        step = facts.size("decoder_sparse_step", 1)
        layers = frozenset(layer for layer in layers if (layer + 1) % step == 0) - _dense_layers(facts)
    if not layers:
        return None
    has_shared = "shared_expert_intermediate_size" in family.reads
    return Mixture(
        layers=layers,
        num_experts=counts[0],
        num_experts_per_tok=top_k,
        intermediate_size=facts.size(family.expert_size_key),
        shared_intermediate_size=facts.size("shared_expert_intermediate_size") if has_shared else 0,
        norm_topk_prob="norm_topk_prob" not in family.reads or facts.flag("norm_topk_prob"),
    )


def _dense_layers(facts: JsonFacts) -> set[int]:
    layers = facts.raw.get("mlp_only_layers") or []
    if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
        raise facts.error(f"mlp_only_layers must be a list of integers, got {layers!r}")
    return set(layers)
