"""Batches: more requests than fit into memory, from an iterator or a file, whose results come as they finish.

`iterate` draws requests as the engine needs them; `openai_requests` and `openai_results` know the form that requests
and answers have in OpenAI's API, `files` how a batch lies in files, and `run_batch` puts it together.
"""
