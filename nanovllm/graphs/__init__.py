"""CUDA graphs of whole steps, by which a GPU does not wait for the host.

A step is the same with a graph and without: `enforce_eager=True` does without, and so does a CPU. The runner asks
whether a step is to be padded to a graph's shape, and has it replayed.
"""
