"""OpenAI's API: what its requests may hold, and how answers and errors are spelled. Knows neither engines nor HTTP.

All but `parsing` needs the extra `[batch]`, and nothing imports it unasked.
"""
