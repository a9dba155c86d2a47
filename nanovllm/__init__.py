"""nano-vllm: offline inference of large language models in a code base that reads in one sitting."""

from importlib.metadata import PackageNotFoundError, version

from nanovllm.llm import LLM
from nanovllm.outputs import RequestError
from nanovllm.sampling_params import SamplingParams

__all__ = ["LLM", "RequestError", "SamplingParams", "__version__"]

try:
    __version__ = version("nano-vllm")
except PackageNotFoundError:  # imported from a folder of sources that was never installed
    __version__ = "0+unknown"
