"""Batches: more requests than fit into memory, from an iterator or a file, whose results come as they finish.

`iterate` draws requests as the engine needs them, `files` knows how a batch lies in files, and `run_batch` puts it
together with OpenAI's API, which needs the extra `[batch]`.
"""
