"""Lets GPU checks keep numbers: ``measured("name", value)``; ``--measured FILE`` says where."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.gpu.measured import MeasuredTest, Value, rows_of, table, write

Measured = Callable[[str, Value], None]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--measured", metavar="FILE", default=None, help="Keep measured numbers here.")


@pytest.fixture
def measured(record_property: Callable[[str, object], None]) -> Measured:
    """Keeps a number of this test, whether or not the test passes afterwards."""
    return record_property


class Keeper:
    """Writes the file after each test, so that a run that is cut leaves what it had."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[MeasuredTest] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.rows += rows_of([report])
        write(self.path, self.rows)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.write_line(table(self.rows))


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("measured", default=None)
    if path is not None:
        config.pluginmanager.register(Keeper(Path(path)))
