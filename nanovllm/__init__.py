"""nano-vllm: offline inference of large language models in a code base that reads in one sitting."""

from importlib.metadata import PackageNotFoundError, version

from nanovllm.async_engine.async_llm import AsyncLLM
from nanovllm.compat.engine_args import EngineArgs
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.inputs import TextPrompt, TokensPrompt
from nanovllm.llm import LLM
from nanovllm.outputs import CompletionOutput, RequestError, RequestOutput
from nanovllm.sampling_params import SamplingParams

__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "EngineArgs",
    "LLMEngine",
    "RequestError",
    "RequestOutput",
    "SamplingParams",
    "TextPrompt",
    "TokensPrompt",
    "__version__",
]

try:
    __version__ = version("nano-vllm")
except PackageNotFoundError:  # imported from a folder of sources that was never installed
    __version__ = "0+unknown"
