"""Weights, config and tokenizer from a GGUF file, llama.cpp's format, with the package gguf.

Tensors are dequantised when they are loaded, to the engine's dtype: a file of 4-bit weights takes as much memory here,
and as much time a step, as the checkpoint that it was made of. It is a way to run a file that is there, no more.
"""
