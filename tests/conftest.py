"""Prepares every test process before a test module can import megatron."""

from megatron_mup import platform

platform.prepare()
