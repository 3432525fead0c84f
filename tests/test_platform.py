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


@pytest.mark.parametrize(
    ("found", "slow"),
    [
        ({"architecture": "x86_64", "avx512_dq": False, "cpu_name": "Old"}, True),
        ({"architecture": "x86_64", "avx512_dq": True, "cpu_name": "New"}, False),
        ({"architecture": "aarch64"}, False),
    ],
)
def test_slow_bf16_is_told_of_x86_without_avx512(
    found: dict[str, object], slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "has_cuda", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    text = platform.slow_bf16()
    assert (text is not None) == slow
    if text:
        assert text.startswith("precision.bf16 is slow on this CPU (Old): without AVX-512")
    monkeypatch.setattr(platform, "has_cuda", lambda: True)
    assert platform.slow_bf16() is None
