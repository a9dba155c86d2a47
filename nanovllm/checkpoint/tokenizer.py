"""The files of a folder that make its tokenizer, read as transformers would, whose import takes longer than a start.

tokenizer.json holds nearly everything. The other files of the folder may know more tokens, and which are special:
tokenizer_config.json (`added_tokens_decoder`, `eos_token` and its like, `additional_special_tokens`), or in older
folders special_tokens_map.json and added_tokens.json. This file knows nothing of models, requests or devices.
"""

import os
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken

from nanovllm.checkpoint.files import read_json, why_damaged
from nanovllm.checkpoint.gguf.files import gguf_package, is_gguf
from nanovllm.checkpoint.gguf.header import read_header

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class TokenizerFiles(NamedTuple):
    """What the files say.

    Attributes:
        backend: the tokenizer of the `tokenizers` package, with all tokens.
        eos_token_id: the token that ends a text, None if the files name none.
        cleans_up: whether decoded texts are to be cleaned up, see `clean_ups.py`.
    """

    backend: tokenizers.Tokenizer
    eos_token_id: int | None
    cleans_up: bool


def read_tokenizer(folder: str) -> TokenizerFiles | None:
    """The tokenizer of a folder or a GGUF file, None if it has none.

    Raises:
        ValueError: the files cannot be used, naming the folder.
    """
    path = os.path.join(folder, "tokenizer.json")
    if os.path.exists(path):
        try:
            backend = tokenizers.Tokenizer.from_file(path)
        except Exception as error:  # the package raises nothing more special
            raise ValueError(f"{path} cannot be read as a tokenizer: {error}{why_damaged(path)}") from error
        return _set_up(backend, folder)
    metadata = read_header(folder).metadata if is_gguf(folder) else None
    if metadata is not None:
        if "tokenizer.ggml.model" not in metadata:
            return None
    elif not os.path.exists(os.path.join(folder, "tokenizer_config.json")):
        return None
    tokenizer = pretrained_tokenizer(folder)  # converts older formats and GGUF's, but takes seconds to import
    if not tokenizer.is_fast:
        raise ValueError(f"the tokenizer in {folder!r} is of a kind that the tokenizers package does not know")
    backend, eos_token_id = tokenizer.backend_tokenizer, tokenizer.eos_token_id
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    if backend.get_vocab(with_added_tokens=False).keys() <= added:  # transformers makes do without the files
        raise ValueError(f"{folder!r} has tokenizer_config.json, but no tokenizer.json or other file of a vocabulary")
    if metadata is not None:  # transformers 4.51 makes another token of it
        eos_token_id = metadata.get("tokenizer.ggml.eos_token_id")
    return TokenizerFiles(backend, eos_token_id, _cleans_up(backend, tokenizer.clean_up_tokenization_spaces))


def pretrained_tokenizer(folder: str) -> Any:
    """transformers' tokenizer of a folder, or of a GGUF file whose metadata have one.

    Raises:
        ValueError: transformers cannot make one.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    place, options, hint = folder, {"trust_remote_code": False}, ""
    if is_gguf(folder):
        gguf_package()  # some versions of transformers read with it
        place, file = os.path.split(read_header(folder).path)
        options = {"gguf_file": file}
    try:
        return AutoTokenizer.from_pretrained(place, **options)
    except Exception as error:  # of any kind
        if os.path.exists(os.path.join(folder, "tokenizer.json")):
            # Its class may be one of a later transformers, or remote code: any will do, this one every version knows.
            return PreTrainedTokenizerFast.from_pretrained(folder, extra_special_tokens={})
        if os.path.exists(os.path.join(folder, "tokenizer.model")):
            hint = "; of its tokenizer.model it does with the packages sentencepiece and protobuf"
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"transformers cannot make the tokenizer of {folder}{hint}, pass tokenizer: {reason}"
        ) from error


def _set_up(backend: tokenizers.Tokenizer, folder: str) -> TokenizerFiles:
    """The tokenizer of tokenizer.json with what the folder's other files say of it, by the rules of transformers 5."""
    config = read_json(os.path.join(folder, "tokenizer_config.json"))
    if "added_tokens_decoder" in config:
        added = {int(token_id): _added_token(token) for token_id, token in config["added_tokens_decoder"].items()}
    else:  # older folders
        config |= read_json(os.path.join(folder, "special_tokens_map.json"))
        special = [*_named_tokens(config).values(), *_extra_tokens(config)]
        added = {}
        for text, token_id in read_json(os.path.join(folder, "added_tokens.json")).items():
            added[token_id] = AddedToken(text, normalized=text not in special, special=text in special)
        added |= backend.get_added_tokens_decoder()  # these say how they are matched
    tokens = [added[token_id] for token_id in sorted(added)]
    named = {name: _added_token(token) for name, token in _named_tokens(config).items()}
    for token in (*tokens, *named.values()):
        token.special |= any(token.content == other.content for other in named.values())
    known = {token.content for token in (*tokens, *backend.get_added_tokens_decoder().values())}
    others = (*named.values(), *map(_added_token, _extra_tokens(config)))
    # In this order, as unknown ones get the next free ids.
    backend.add_tokens(tokens + [token for token in others if token.content not in known])
    backend.encode_special_tokens = bool(config.get("split_special_tokens", False))
    eos_token_id = backend.token_to_id(named["eos_token"].content) if "eos_token" in named else None
    return TokenizerFiles(
        backend, eos_token_id, _cleans_up(backend, config.get("clean_up_tokenization_spaces", False))
    )


def _named_tokens(config: dict[str, Any]) -> dict[str, str | dict[str, Any]]:
    """The tokens that tokenizer_config.json has a name for: the usual ones, then a model's own (`image_token`)."""
    extra = config.get("extra_special_tokens")
    named = config | (extra if isinstance(extra, dict) else {})
    own = [name for name in named if name.endswith("_token") and name not in SPECIAL_TOKENS]
    return {name: named[name] for name in (*SPECIAL_TOKENS, *own) if isinstance(named.get(name), (str, dict))}


def _extra_tokens(config: dict[str, Any]) -> list[str | dict[str, Any]]:
    """The special tokens of tokenizer_config.json that have no name."""
    extra = config.get("extra_special_tokens")
    return extra if extra and isinstance(extra, list) else config.get("additional_special_tokens", [])


def _added_token(token: str | dict[str, Any]) -> AddedToken:
    """A token as the files spell it: its text, or an object that says how it is matched too."""
    if isinstance(token, str):
        return AddedToken(token, special=True)
    return AddedToken(**{key: value for key, value in token.items() if key != "__type"})


def _cleans_up(backend: tokenizers.Tokenizer, is_asked_for: bool) -> bool:
    """Not for BPE, whose spaces are the text's own; transformers ignores the wish there too (from version 5 on)."""
    return is_asked_for and not isinstance(backend.model, tokenizers.models.BPE)
