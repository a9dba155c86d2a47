"""The engine behind event loops, for any number of coroutines: `AsyncLLM`.

`async_llm` is the caller's side, `stream` what a call is yet to read, `engine_process` the process that steps. Nothing
here knows of HTTP, and the engine knows nothing of this.
"""
