"""Lion's update, and what happens where it cannot be compiled."""

from __future__ import annotations

import logging

import pytest
import torch
from emerging_optimizers.scalar_optimizers import lion as lion_module

from megatron_mup.optimizer import upstream
from tests.configurations import tiny
from tests.optimizer.built_runs import built
from tests.optimizer.trained_runs import train_steps

_LION = ("optimizer.optimizer=lion", "clip_grad=0", "lr_decay_style=constant")


@pytest.mark.parametrize("layout", [(), ("use_distributed_optimizer=true",)])
def test_the_first_step_moves_every_weight_by_its_learning_rate_and_decays_it(
    layout: tuple[str, ...],
) -> None:
    options = ("weight_decay=0.5", "weight_decay_mode=coupled", "lion_beta2=0.75")
    with built(tiny(*_LION, *options, *layout)) as state:
        (model,) = state.model_chunks
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        train_steps(state, 1)
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            # tiny: M = 64 over 32, so hidden matrices and the readout move by half of 2^-6.
            rate = 0.015625 if name.startswith("embedding") else 0.0078125
            gradient = parameter.main_grad
            expected = before[name] * (1 - rate * 0.5) - rate * torch.sign(gradient)
            torch.testing.assert_close(parameter.detach(), expected, rtol=0, atol=1e-6)
        moments = [m["exp_avg"] for m in state.optimizer.chained_optimizers[0].state.values()]
        fc2 = dict(model.named_parameters())["decoder.layers.1.mlp.linear_fc2.weight"]
        expected = 0.25 * fc2.main_grad
        assert any(
            m.numel() == expected.numel() and torch.allclose(m.view(-1), expected.view(-1))
            for m in moments
        )


def test_without_a_compiler_the_update_runs_eagerly_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def compiled(*_: object, **__: object) -> None:
        raise AssertionError("compiled code was called")

    compiled.__wrapped__ = lambda grad, exp_avg, *, betas: torch.sign(grad)  # type: ignore[attr-defined]
    monkeypatch.setattr(lion_module, "calculate_lion_update", compiled)
    monkeypatch.setattr(upstream.shutil, "which", lambda _name: None)
    upstream._run_eagerly_without_compiler.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            with built(tiny(*_LION)) as state:
                train_steps(state, 1)
    assert [r.message for r in caplog.records if "Lion's update runs eagerly" in r.message] == [
        "no C++ compiler (c++, g++, clang++) was found: Lion's update runs eagerly, which is "
        "slower; install one or set CXX"
    ]
    upstream._run_eagerly_without_compiler.cache_clear()


def test_with_a_compiler_nothing_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before = lion_module.calculate_lion_update
    monkeypatch.setattr(upstream.shutil, "which", lambda name: f"/bin/{name}")
    upstream._run_eagerly_without_compiler.cache_clear()
    with caplog.at_level(logging.WARNING), built(tiny(*_LION)):
        pass
    assert lion_module.calculate_lion_update is before
    assert caplog.records == []
