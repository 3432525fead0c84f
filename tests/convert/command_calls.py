"""A command called in this process, as a user types it."""

from __future__ import annotations

from pathlib import Path

import typer
from typer.testing import CliRunner, Result


def call(app: typer.Typer, *words: str | Path) -> Result:
    """Run a verb; raises what the command raises, but for its own exit."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result
