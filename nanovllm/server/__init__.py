"""The engine as a service: an `AsyncLLM` behind HTTP, as OpenAI's API has it.

All of it needs the extra `[server]`, and nothing imports it unasked.
"""
