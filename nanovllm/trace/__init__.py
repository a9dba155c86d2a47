"""Recording what the steps of an engine do, and printing it; what a record is, `recorder.Recorder` says.

A recorder wraps the methods of one engine from outside. With NANOVLLM_TRACE=run.json in the environment, every engine
gets one; `python -m nanovllm.timeline run.json` draws what it wrote.
"""

from nanovllm.trace.recorder import Recorder, record_engine

__all__ = ["Recorder", "record_engine"]
