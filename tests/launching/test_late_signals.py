"""Signals between the end of training and that of the process."""

from __future__ import annotations

import os
import signal
import sys
from types import ModuleType, SimpleNamespace

import pytest

from megatron_mup import cli
from tests.configurations import tiny


def test_a_signal_behind_the_end_of_training_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loop, dynamics = ModuleType("loop"), ModuleType("dynamics")
    vars(loop)["train"] = lambda *_arguments, **_options: SimpleNamespace(exit_code=0)
    vars(dynamics)["observer_for"] = lambda _run: None
    monkeypatch.setitem(sys.modules, "megatron_mup.training.loop", loop)
    monkeypatch.setitem(sys.modules, "megatron_mup.diagnostics.dynamics", dynamics)
    heard: list[int] = []
    numbers = (signal.SIGUSR1, signal.SIGTERM)
    before = {
        number: signal.signal(number, lambda number, _frame: heard.append(number))
        for number in numbers
    }
    try:
        cli._train(tiny())
        for number in numbers:
            os.kill(os.getpid(), number)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert heard == []
