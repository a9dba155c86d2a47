"""vLLM's `EngineArgs`, which its scripts make an `LLMEngine` of."""

from typing import Any


class EngineArgs:
    """The arguments of an engine, as `LLMEngine.from_engine_args` takes them; what they may be, `Config` says."""

    def __init__(self, model: str, **options: Any) -> None:
        self.model = model
        self.options = options
