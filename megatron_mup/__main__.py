"""``python -m megatron_mup`` is the ``megatron-mup`` command, e.g. under torchrun."""

from megatron_mup.cli import main

if __name__ == "__main__":
    main()
