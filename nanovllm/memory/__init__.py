"""How many blocks the KV cache may have: what a step takes, found by running the largest ones, and what is left.

Where `num_kvcache_blocks` is given, that is all there is to know. Nothing here knows what blocks are for.
"""
