"""What an engine tells of itself: a line when it starts, a bar while a call runs, numbers when someone asks.

`startup`, `progress` and `metrics`; nothing here changes what an engine does.
"""
