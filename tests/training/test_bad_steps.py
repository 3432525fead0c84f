"""Bad steps: which count as one, what follows, what is remembered and kept."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_mup.config import BadStepPolicy, FaultConfig
from megatron_mup.errors import CheckpointError
from megatron_mup.training.bad_steps import BadSteps, Outcome, Verdict, save_bad_batch

GOOD = Verdict(Outcome.GOOD)


def skipping(*, factor: float | None = None, at_most: int = 10) -> BadSteps:
    return BadSteps(
        FaultConfig(
            bad_step_policy=BadStepPolicy.SKIP, loss_spike_factor=factor, max_skipped_steps=at_most
        )
    )


@pytest.mark.parametrize(
    ("loss", "norm", "reason"),
    [
        (math.nan, 1.0, "loss is nan"),
        (math.inf, 1.0, "loss is inf"),
        (3.0, math.nan, "gradient norm is nan"),
        (3.0, math.inf, "gradient norm is inf"),
        (None, math.inf, "gradient norm is inf"),
    ],
)
def test_numbers_that_are_not_finite_are_bad(loss: float | None, norm: float, reason: str) -> None:
    assert skipping().judge(loss, norm) == Verdict(Outcome.SKIP, reason)
    stopped = BadSteps(FaultConfig()).judge(loss, norm)
    assert stopped.outcome is Outcome.STOP
    assert stopped.reason == reason


def test_good_steps_are_updated_and_bad_ones_are_not() -> None:
    judge = skipping()
    assert judge.judge(3.0, 1e6) == GOOD
    assert judge.judge(None, 1.0) == GOOD
    assert not GOOD.vetoed
    assert Verdict(Outcome.SKIP).vetoed
    assert Verdict(Outcome.STOP).vetoed


def test_a_spike_is_measured_against_the_mean_of_good_losses_after_twenty() -> None:
    judge = skipping(factor=2.0)
    for _ in range(19):
        assert judge.judge(3.0, 1.0) == GOOD
    # Nineteen good steps are too few to know what is usual; then the mean is (19 * 3 + 7) / 20.
    assert judge.judge(7.0, 1.0) == GOOD
    assert judge.judge(6.4, 1.0) == GOOD
    verdict = judge.judge(6.75, 1.0)
    assert verdict.outcome is Outcome.SKIP
    assert verdict.reason == (
        "loss 6.75 is a spike: more than faults.loss_spike_factor 2 x 3.352, the mean of the last "
        "21 good steps"
    )


def test_only_the_last_hundred_good_losses_count() -> None:
    judge = skipping(factor=1.5)
    for loss in [9.0] * 100 + [6.1] * 100:
        assert judge.judge(loss, 1.0) == GOOD
    assert judge.judge(9.16, 1.0).outcome is Outcome.SKIP
    # The spike itself left no trace: the mean is still 6.1.
    assert judge.judge(9.14, 1.0) == GOOD


def test_without_a_factor_no_finite_loss_is_a_spike() -> None:
    judge = skipping()
    for _ in range(30):
        judge.judge(1.0, 1.0)
    assert judge.judge(1e9, 1.0) == GOOD


def test_more_skipped_steps_in_a_row_than_allowed_stop_the_run() -> None:
    judge = skipping(at_most=2)
    outcomes = [judge.judge(3.0, norm).outcome for norm in (math.nan, 1.0, math.nan, math.nan)]
    assert outcomes == [Outcome.SKIP, Outcome.GOOD, Outcome.SKIP, Outcome.SKIP]
    assert judge.skipped == 3
    verdict = judge.judge(3.0, math.nan)
    assert verdict.outcome is Outcome.STOP
    assert verdict.reason == (
        "gradient norm is nan, after 2 skipped steps in a row, all that faults.max_skipped_steps "
        "allows"
    )
    assert judge.skipped == 3


def test_a_resumed_judge_goes_on_as_the_uninterrupted_one() -> None:
    losses = [3.0 + 0.001 * step for step in range(120)] + [math.nan] * 2
    uninterrupted = skipping(factor=1.1, at_most=3)
    for loss in losses:
        uninterrupted.judge(loss, 1.0)
    resumed = skipping(factor=1.1, at_most=3)
    # Through JSON: the state is plain data.
    resumed.load_state_dict(json.loads(json.dumps(uninterrupted.state_dict())))
    assert resumed.skipped == 2
    for loss in (math.nan, math.nan, 3.3, 3.5):
        assert resumed.judge(loss, 1.0) == uninterrupted.judge(loss, 1.0)
    assert resumed.skipped == 4


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"recent_losses": 5, "skipped_in_a_row": 0, "skipped": 0},
        {"recent_losses": ["x"], "skipped_in_a_row": 0, "skipped": 0},
    ],
)
def test_a_damaged_state_is_refused_with_the_cure(state: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match=r"damaged .*checkpoint\.ckpt_step"):
        skipping().load_state_dict(state)


def microbatch(first: int) -> dict[str, torch.Tensor]:
    tokens = torch.arange(first, first + 6).reshape(2, 3)
    mask = torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 0.0]])
    return {"tokens": tokens, "labels": tokens + 1, "loss_mask": mask, "position_ids": tokens}


def test_a_bad_batch_is_read_back_without_pickle(tmp_path: Path) -> None:
    batches = [microbatch(0), microbatch(70_000)]
    path = save_bad_batch(tmp_path, 123, rank=4, batches=batches, reason="loss is nan")
    assert path == tmp_path / "bad_batches" / "iter_0000123_rank4.npz"
    assert [file.name for file in path.parent.iterdir()] == ["iter_0000123_rank4.npz"]
    with np.load(path, allow_pickle=False) as saved:
        assert sorted(saved) == ["labels", "loss_mask", "reason", "tokens"]
        assert saved["tokens"].dtype == np.int64
        assert saved["tokens"][:, 0].tolist() == [0, 3, 70_000, 70_003]
        assert saved["labels"][3].tolist() == [70_004, 70_005, 70_006]
        assert saved["loss_mask"].dtype == np.uint8
        assert saved["loss_mask"].tolist() == [[1, 0, 1], [1, 1, 0]] * 2
        assert str(saved["reason"]) == "loss is nan"


def test_a_disk_that_refuses_the_bad_batch_costs_a_warning_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "bad_batches").write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        assert save_bad_batch(tmp_path, 7, rank=0, batches=[microbatch(0)], reason="x") is None
    assert "the bad batch of iteration 7 is not saved" in caplog.text
