"""Maximal update parameterization (muP) for GPT training with megatron-core."""

__version__ = "0.1.0"
