"""`python -m nanovllm.server MODEL`."""

import sys

from nanovllm.server.serve import main

sys.exit(main())
