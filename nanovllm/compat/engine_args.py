"""vLLM's `EngineArgs`, which its scripts make an `LLMEngine` of."""

from types import SimpleNamespace
from typing import Any


class EngineArgs(SimpleNamespace):
    """The arguments of an engine as attributes, which may be assigned to; what they may be, `Config` says.

    `LLMEngine.from_engine_args(args)` and `LLM(**vars(args))` take them.
    """

    def __init__(self, model: str, **options: Any) -> None:
        super().__init__(model=model, **options)
