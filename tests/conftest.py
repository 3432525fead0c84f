"""Prepares every test process before a test module can import megatron."""

from megatron_mup import platform
from tests.distributed.summary import pytest_terminal_summary

__all__ = ["pytest_terminal_summary"]

platform.prepare()
