"""Chats: conversations become prompts, through a chat template. Nothing here knows of engines or parameters."""
