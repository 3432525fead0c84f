"""One experiment written twice, for the package and for the reference, and held side by side.

Owns the small size of the runs, the targets and the tolerances. A case names the preset and the
options as a user would give them, and the study as the papers state it: neither is computed from
the other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_mup.config import RunConfig
from megatron_mup.run_source import RunSource
from tests.reference import rules
from tests.reference.descent import Trajectory, draw_weights, train
from tests.reference.package_runs import by_logical_name, package_trajectory
from tests.reference.rules import Study

SMALL = Study(width=64, base_width=16, head_dim=16)
"""m = 4, two layers: a wrong power of m is a factor of 2 or 4."""

_ROWS, _POSITIONS = 4, 32
_SIZES = (
    "vocab_size=260",
    "make_vocab_size_divisible_by=1",
    f"seq_length={_POSITIONS}",
    "train_iters=20",
    f"global_batch_size={_ROWS}",
    f"micro_batch_size={_ROWS}",
    "lr_warmup_iters=5",
    "data.eod_token=257",
)
_SENSITIVE_LR = 2.0**-6


@dataclass(frozen=True)
class Case:
    """An experiment: the package's preset and options, and the study that the papers describe."""

    preset: str
    options: tuple[str, ...]
    study: Study


def case(preset: str, *options: str, lr: float = _SENSITIVE_LR, **study: Any) -> Case:
    """Build a case; both sides get the peak LR that is named here, and the small size."""
    return Case(preset, (*options, f"optimizer.lr={lr!r}"), replace(SMALL, lr=lr, **study))


def package_run(one: Case) -> RunConfig:
    """Return the package's configuration, as the command line would load it."""
    study = one.study
    source = RunSource(
        preset=one.preset,
        width=study.width,
        head_dim=study.head_dim,
        base_width=study.base_width,
    )
    layers = (f"model.num_layers={study.layers}", f"base_num_layers={study.base_layers}")
    return source.load([*_SIZES, *layers, *one.options])


@cache
def targets() -> np.ndarray:
    """Return real text, thinned: int16 [20 steps, B, T] with documents that end at 257."""
    archive = np.load(Path(__file__).parents[1] / "training" / "trajectories_width128.npz")
    tokens: np.ndarray = archive["tokens"][:, ::2, ::2]
    assert tokens.shape == (20, _ROWS, _POSITIONS)
    return tokens


def assert_same_rules(one: Case) -> None:
    """Every tensor's shape, init, LR, decay a step, eps and multiplier is the reference's.

    Trajectories alone would miss an init std, since their weights are given, and a small epsilon.
    """
    study, run = one.study, package_run(one)
    assert run.model.norm_epsilon == study.norm_eps
    assert run.optimizer_numbers.betas == pytest.approx(rules.betas(study))
    names = by_logical_name(study, draw_weights(study))
    rows = run.table.rows
    assert {row.tensor.name for row in rows} == names.keys()
    for row in rows:
        name, values = names[row.tensor.name]
        expected = rules.tensor_rule(study, name)
        assert row.tensor.shape == values.reshape(row.tensor.shape).shape
        assert row.init_std == pytest.approx(rules.initial_std(study, name), rel=1e-12), name
        assert row.lr == pytest.approx(expected.lr, rel=1e-12), name
        assert row.lr * row.weight_decay == pytest.approx(expected.decay_a_step, rel=1e-12), name
        assert row.forward_mult == pytest.approx(rules.forward_multiplier(study, name)), name
        if study.optimizer == "adamw":
            assert row.eps == pytest.approx(expected.eps, rel=1e-12), name


def assert_same_training(one: Case) -> None:
    """Twenty steps of the package in fp32 follow the reference in fp64.

    Lion's tolerance on losses is wider because a sign amplifies rounding.
    """
    study = one.study
    expected = train(study, targets())
    found = package_trajectory(package_run(one), study, targets())
    assert_close(found, expected, loss=5e-4 if study.optimizer == "lion" else 5e-5)


def assert_close(found: Trajectory, expected: Trajectory, *, loss: float) -> None:
    """Compare losses (absolute), gradient norms (1e-3) and final norms (2e-5, both relative).

    A decay of 1e-5 a step moves final norms by 1e-4 in all; rounding, by 7e-6 at most.
    """
    np.testing.assert_allclose(found.loss, expected.loss, rtol=0, atol=loss)
    np.testing.assert_allclose(found.gradient_loss, expected.gradient_loss, rtol=0, atol=loss)
    np.testing.assert_allclose(found.gradient_norm, expected.gradient_norm, rtol=1e-3)
    assert found.final_norm == pytest.approx(expected.final_norm, rel=2e-5)
