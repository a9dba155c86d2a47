"""nano-vllm: offline inference of large language models in a code base that reads in one sitting."""

from nanovllm.llm import LLM
from nanovllm.sampling_params import SamplingParams

__all__ = ["LLM", "SamplingParams"]
