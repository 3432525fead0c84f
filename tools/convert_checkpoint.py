"""Megatron-LM's name for ``megatron-mup convert``."""

import sys

from megatron_mup.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["convert"]
    main()
