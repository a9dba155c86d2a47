"""The methods of vLLM's `LLM` that are not here, and why; and where its attributes are."""

from collections.abc import Callable
from typing import Any, NoReturn

NO_POOLING = "the models generate tokens; they have no head that pools hidden states"
ONE_PROCESS = "there are no workers to be called: what a rank runs is the engine's own"
REFUSED = {
    "encode": f"{NO_POOLING} (for token ids, there is `llm.tokenizer.encode`)",
    "embed": NO_POOLING,
    "classify": NO_POOLING,
    "score": NO_POOLING,
    "reward": NO_POOLING,
    "set_tokenizer": "an engine keeps its tokenizer; LLM(..., tokenizer=...) starts one with another",
    "sleep": "an engine keeps its memory until `close`; starting another takes seconds",
    "wake_up": "an engine never sleeps",
    "start_profile": "`bench.py --profile` makes a trace, as torch.profiler around any calls does",
    "stop_profile": "`bench.py --profile` makes a trace, as torch.profiler around any calls does",
    "collective_rpc": ONE_PROCESS,
    "apply_model": ONE_PROCESS,
}
OPTIONS = "`llm.config` has the options as they were resolved, its `model_config` the facts of config.json"
ELSEWHERE = {  # attributes of vLLM's LLM and LLMEngine
    "model_config": OPTIONS,
    "vllm_config": OPTIONS,
    "get_model_config": OPTIONS,
    "model_executor": ONE_PROCESS,
    "engine_core": "the LLM is the engine itself; `close` ends it",
    "shutdown": "`close` ends an engine",
}


def refused_method(owner: object, name: str) -> Callable[..., NoReturn]:
    """What stands for such a method: it raises ValueError when called, with the reason.

    Raises:
        AttributeError: another name; with the place of what is ELSEWHERE.
    """
    if name not in REFUSED:
        hint = f": {ELSEWHERE[name]}" if name in ELSEWHERE else ""
        raise AttributeError(f"{type(owner).__name__!r} object has no attribute {name!r}{hint}")

    def refuse(*arguments: Any, **options: Any) -> NoReturn:
        raise ValueError(f"LLM.{name} is not supported: {REFUSED[name]}")

    return refuse
