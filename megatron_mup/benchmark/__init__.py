"""Speed of a training step, as ratios to stock Megatron-Core and to plain PyTorch."""

from megatron_mup import platform

platform.prepare()
