"""How a draft model is run beside the engine's, and whether it can be. Knows nothing of what it drafts."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nanovllm.config import Config


def draft_config_of(config: Config) -> Config:
    """What a draft model is to be run with: the options of the engine, which are resolved, but for the checkpoint's.

    Raises:
        TypeError, ValueError: the draft model cannot be run with them, or beside the engine's model.
    """
    draft_config = replace(
        config,
        model=config.speculation.model,
        revision=None,
        hf_config_path=None,
        hf_overrides=None,
        skip_tokenizer_init=True,
        generation_config="vllm",
        load_format="dummy" if config.load_format == "dummy" else "auto",
        quantization=None,
        speculative_config=None,
    )
    facts, own_facts = draft_config.model_config, config.model_config
    if facts.vocab_size != own_facts.vocab_size:
        raise ValueError(
            f"the 'model' of speculative_config must have the tokens of the engine's: its vocab_size is "
            f"{facts.vocab_size}, not {own_facts.vocab_size}"
        )
    if facts.hidden_size > own_facts.hidden_size:
        raise ValueError(
            f"the 'model' of speculative_config must be no wider than the engine's: its hidden_size is "
            f"{facts.hidden_size}, beyond {own_facts.hidden_size}"
        )
    if draft_config.max_model_len < config.max_model_len:
        raise ValueError(
            f"the 'model' of speculative_config has {draft_config.max_model_len} positions, fewer than "
            f"max_model_len={config.max_model_len}"
        )
    draft_config.speculation = config.speculation  # by which it is known how many tokens decodes may have
    return draft_config
