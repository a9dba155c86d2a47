"""Requests: what stands between a user's call and the sequences that the engine schedules, on the way in and back.

`admission` checks a call, `defaults` has the parameters of those that bring none, `intake` makes sequences, `text_end`
knows when a text is over, `request` makes the result, and `open_requests` keeps those that have not finished. Nothing
here knows how a step is computed.
"""
