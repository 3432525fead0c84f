"""How a benchmark's command begins and ends; imports nothing that takes long."""

from __future__ import annotations

import sys
from collections.abc import Callable

import typer

from megatron_mup.errors import MupError


def run_command(measure: Callable[..., None]) -> None:
    """Run a command line; user errors end with one message and their exit code.

    Args:
        measure: The command; its parameters are the options.
    """
    try:
        typer.run(measure)
    except MupError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
