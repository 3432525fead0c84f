"""SIGTERM ends a conversion as Ctrl-C does: nothing is left of it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_mup.convert.commands import app
from megatron_mup.convert.megatron_source import MegatronSource
from megatron_mup.convert.termination import ends_at_sigterm
from tests.convert.command_calls import call
from tests.convert.small_checkpoints import GQA, MakeCheckpoint

LATE = "decoder.layers.1.mlp.linear_fc2.weight"


class NotCaughtError(Exception):
    """SIGTERM reached the handler that was there before."""


@pytest.fixture(autouse=True)
def survive() -> Iterator[None]:
    """Keeps the tests alive where nothing handles the signal."""

    def fail(*_: Any) -> None:
        raise NotCaughtError

    before = signal.signal(signal.SIGTERM, fail)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("words", [("to-hf", "--format", "llama", "--output"), ("to-sp", "--save")])
def test_a_conversion_that_is_terminated_leaves_nothing(
    words: tuple[str, ...],
    checkpoint_of: MakeCheckpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder, real = checkpoint_of(*GQA), MegatronSource.read
    seen: list[str] = []

    def read(self: MegatronSource, name: str) -> torch.Tensor:
        if name == LATE:
            seen.extend(path.name for path in tmp_path.rglob("*.tmp"))
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, name)

    monkeypatch.setattr(MegatronSource, "read", read)
    result = call(app, *words, tmp_path / "out", "--load", folder, "--no-verify")
    assert result.exit_code == 143
    # It was in the middle of it.
    assert len(seen) == 1
    assert [path for path in tmp_path.rglob("*") if path.name != "out"] == []
    assert "stopped by SIGTERM" in capfd.readouterr().err


def test_a_second_signal_does_not_cut_the_cleaning_up_short() -> None:
    cleaned: list[bool] = []

    def interrupted_twice() -> None:
        with ends_at_sigterm():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            finally:
                os.kill(os.getpid(), signal.SIGTERM)
                cleaned.append(True)

    with pytest.raises(SystemExit) as ended:
        interrupted_twice()
    assert (ended.value.code, cleaned) == (143, [True])
    # Whatever handled it before does so again.
    with pytest.raises(NotCaughtError):
        os.kill(os.getpid(), signal.SIGTERM)
