"""`python -m nanovllm`: the command line."""

import sys

from nanovllm.cli.main import main

if __name__ == "__main__":  # ranks that are spawned import this file too
    sys.exit(main())
