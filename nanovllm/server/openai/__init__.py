"""OpenAI's API: what its requests may hold, and how answers are spelled. Knows of no engine and no HTTP."""
