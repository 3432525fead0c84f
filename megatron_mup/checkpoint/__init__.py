"""Checkpoints in Megatron's layout, with the parameterization they belong to."""

from megatron_mup import platform

platform.prepare()
