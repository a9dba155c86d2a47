"""The engine as a service: behind an event loop (`AsyncLLM`), and behind HTTP, as OpenAI's API has it.

`async_llm` needs nothing beyond the package; all else needs the extra `[server]`, and nothing imports it unasked.
"""
