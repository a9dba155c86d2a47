"""The names of models, tokenizers and their files become folders of this machine, or a GGUF file."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from nanovllm.checkpoint.files import find_generation_config, find_tokenizer, has_tokenizer, resolve_model_path
from nanovllm.checkpoint.gguf.files import find_gguf

if TYPE_CHECKING:
    from nanovllm.config import Config


def find_folders(config: Config) -> None:
    """Resolves model, tokenizer, hf_config_path and generation_config, from the hub where they are not here.

    Raises:
        TypeError, ValueError: naming the option, which is neither a folder with the files in question nor a model of
            the hub.
    """
    hub, name = {"download_dir": config.download_dir, "hf_token": config.hf_token}, config.model
    folder = resolve_model_path(name, config.load_format != "dummy", revision=config.revision, **hub)
    config.model = find_gguf(folder, config.load_format) or folder
    if config.hf_config_path is not None:
        asked = config.hf_config_path
        config.hf_config_path = resolve_model_path(asked, option="hf_config_path", **hub)
        if not os.path.isfile(os.path.join(config.hf_config_path, "config.json")):
            raise ValueError(f"hf_config_path={asked!r} has no config.json")
    elif config.model != folder:  # a GGUF file, beside which the folder may have more
        if os.path.isfile(os.path.join(folder, "config.json")):
            config.hf_config_path = folder
        elif config.generation_config == "auto" and os.path.isfile(os.path.join(folder, "generation_config.json")):
            config.generation_config = folder
    if config.skip_tokenizer_init:
        config.tokenizer = None
    elif config.tokenizer is None and config.tokenizer_revision is None:
        config.tokenizer = folder if has_tokenizer(folder) else config.model
    else:
        name = name if config.tokenizer is None else config.tokenizer
        config.tokenizer = find_tokenizer(name, revision=config.tokenizer_revision, **hub)
    if config.generation_config not in ("auto", "vllm"):
        config.generation_config = find_generation_config(config.generation_config, **hub)
