"""Roles and rules turned into a Megatron-Core GPT: specs, hooks, initialization."""

from megatron_mup import platform

platform.prepare()
