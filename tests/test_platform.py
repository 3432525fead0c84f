"""Deterministic mode: what is set while it lasts, and what a user's own choice means."""

from __future__ import annotations

import os

import pytest
import torch

from megatron_mup import platform

VARIABLES = ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO", "NVTE_ALLOW_NONDETERMINISTIC_ALGO")


def test_deterministic_mode_sets_what_the_libraries_read_and_takes_it_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)

    with platform.deterministic():
        assert [os.environ[name] for name in VARIABLES] == [":4096:8", "Ring", "0"]
        assert torch.are_deterministic_algorithms_enabled()

    assert not any(name in os.environ for name in VARIABLES)
    assert not torch.are_deterministic_algorithms_enabled()


def test_deterministic_mode_keeps_a_choice_that_is_deterministic_and_names_another(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    chosen = dict(zip(VARIABLES, (":16:8", "Tree", "1"), strict=True))
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)

    with platform.deterministic():
        assert [os.environ[name] for name in VARIABLES] == [":16:8", "Tree", "0"]

    assert {name: os.environ[name] for name in VARIABLES} == chosen
    assert caplog.messages == [
        "precision.deterministic_mode sets NVTE_ALLOW_NONDETERMINISTIC_ALGO=0; it was 1"
    ]
