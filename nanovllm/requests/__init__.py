"""Requests: what stands between a user's call and the sequences that the engine schedules, on the way in and back.

`admission` checks a call, `intake` makes sequences, `request` makes their result, and `open_requests` keeps those that
have not finished. Nothing here knows how a step is computed.
"""
