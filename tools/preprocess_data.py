"""Megatron-LM's name for ``megatron-mup data preprocess``."""

import sys

from megatron_mup.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["data", "preprocess"]
    main()
