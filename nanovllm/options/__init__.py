"""What serves the options of an engine and of requests: how they are checked, and what becomes of names and "auto".

Which options there are, and their limits, say `config.py`, `sampling_params.py` and the other files of parameters.
"""
