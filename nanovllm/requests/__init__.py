"""Requests: what stands between a user's call and the sequences that the engine schedules, on the way in and back.

`admission` checks a call, `defaults` has the parameters of those that bring none, `intake` makes sequences, `request`
makes their result, `text_end` knows when a text is over, `progress` shows how many are done, `metrics` counts what was done. Nothing here knows how a step
is computed.
"""
