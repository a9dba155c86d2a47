"""Chats: conversations become prompts, through a chat template, and an answer may come piece by piece.

`template` renders, `prompts` makes prompts of it, and `stream`, which alone knows of the engine, yields its pieces.
"""
