"""What measures the engine and draws it, for bench.py and from the command line; no part of the package."""
