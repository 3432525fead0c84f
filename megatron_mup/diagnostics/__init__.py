"""What training does to a model, measured: coordinate checks and update dynamics."""

from megatron_mup import platform

platform.prepare()
