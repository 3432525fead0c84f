"""Prepares this process before any test module of this folder imports megatron."""

from megatron_mup import platform

platform.prepare()
