"""The loop: schedule, metrics, evaluation, batch ramp-up, profiling, precision."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from megatron_mup.config import LossDenominator, RunConfig
from megatron_mup.errors import ConfigError
from megatron_mup.training.loop import TrainData, TrainResult, train
from megatron_mup.training.step import loss_function
from tests.configurations import tiny
from tests.random_samples import RandomSamples


def run_training(run: RunConfig, lines: list[str] | None = None) -> TrainResult:
    """Train on random tokens; log lines go to ``lines``."""
    samples = RandomSamples(run.model.vocab_size, run.model.seq_length)
    sink = [] if lines is None else lines
    return train(run, data=TrainData(samples, samples), echo=sink.append)


def column(result: TrainResult, name: str) -> list[float]:
    """One metric over the logged iterations."""
    return [row[name] for row in result.history if name in row]


def test_training_learns_and_reports_every_step() -> None:
    lines: list[str] = []
    result = run_training(tiny("train_iters=40", "lr=0.03"), lines)
    losses = column(result, "lm loss")
    assert len(losses) == 40
    assert losses[0] == pytest.approx(math.log(96), abs=0.05)
    assert losses[-1] < losses[0] - 0.1
    assert "iteration      40/40" in lines[-1]
    assert "left 0:00:00" in lines[-1]
    assert "tokens/sec" in lines[-1]


def test_learning_rate_follows_the_schedule_from_the_first_step() -> None:
    result = run_training(
        tiny(
            "train_iters=6",
            "lr=1",
            "lr_warmup_iters=2",
            "lr_warmup_init_ratio=0.5",
            "min_lr_ratio=0.2",
        )
    )
    # Linear warmup from 0.5 at t=0 to 1 at t=2, then linear to 0.2 at t=6 (not reached).
    assert column(result, "learning-rate") == pytest.approx([0.5, 0.75, 1.0, 0.8, 0.6, 0.4])


def test_interval_metrics_average_over_the_interval() -> None:
    single = column(run_training(tiny("log_interval=1")), "lm loss")
    triple = column(run_training(tiny("log_interval=3")), "lm loss")
    assert triple == pytest.approx([sum(single[:3]) / 3, sum(single[3:]) / 3], rel=1e-6)


def test_evaluation_uses_held_out_samples_and_does_not_train() -> None:
    frozen = ["lr=0", "weight_decay_mode=coupled", "eval_iters=1", "eval_interval=2"]
    result = run_training(tiny("train_iters=4", *frozen))
    # With a learning rate of 0 and the same samples, the first training loss is the held-out one.
    validation = column(result, "lm loss validation")
    assert validation == [column(result, "lm loss")[0]] * 2
    assert result.validation_loss == validation[-1]
    perplexity = column(result, "lm loss validation ppl")[0]
    assert perplexity == pytest.approx(math.exp(validation[0]))


def test_batch_ramp_up_reads_consecutive_samples() -> None:
    seen: list[int] = []

    class Recorder(RandomSamples):
        def __getitem__(self, index: int) -> Mapping[str, Tensor]:
            seen.append(index)
            return super().__getitem__(index)

    run = tiny("train_iters=5", "rampup_batch_size=[2,2,6]", "global_batch_size=6")
    result = train(run, data=TrainData(Recorder(96, 16)), echo=lambda _line: None)
    # Two increments over six samples: 2 until 3 samples, then 4 until 6, then 6.
    assert column(result, "batch-size") == [2, 2, 4, 6, 6]
    assert seen == list(range(20))


def test_rate_counts_the_samples_that_were_read_when_the_batch_grows() -> None:
    result = run_training(
        tiny("train_iters=5", "rampup_batch_size=[2,2,6]", "global_batch_size=6", "log_interval=5")
    )
    (row,) = result.history
    # Batches of 2, 2, 4, 6 and 6 sequences of 16 tokens.
    assert row["tokens/sec"] * row["iteration-time"] * 5 == pytest.approx(20 * 16)


def test_the_parameter_table_is_logged_at_the_start() -> None:
    lines: list[str] = []
    run_training(tiny("train_iters=1"), lines)
    assert "110,592 parameters in 14 logical tensors" in lines[0]
    assert "forward multipliers: embedding 1" in lines[0]


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("checkpoint.save={file}/deeper", "checkpoint.save"),
        ("logging.tensorboard_dir={file}", "logging.tensorboard_dir"),
        ("logging.metrics_path={folder}", "is a folder; give the name of a JSON lines file"),
        ("data.data_cache_path={file}", "data.data_cache_path"),
    ],
)
def test_outputs_that_cannot_be_written_are_refused_before_training(
    option: str, words: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    filled = option.format(file=tmp_path / "file", folder=tmp_path)
    lines: list[str] = []
    with pytest.raises(ConfigError, match=words):
        run_training(tiny(filled), lines)
    assert lines == []


def test_metrics_go_to_json_lines_and_tensorboard_under_megatrons_names(tmp_path: Path) -> None:
    run_training(
        tiny(
            "train_iters=2",
            "eval_iters=1",
            f"metrics_path={tmp_path / 'metrics.jsonl'}",
            f"tensorboard_dir={tmp_path / 'tensorboard'}",
        )
    )
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [1, 2, 2]
    names = {"lm loss", "learning-rate", "batch-size", "grad-norm", "iteration-time"}
    assert names <= set(rows[0])
    assert {"lm loss validation", "lm loss validation ppl"} <= set(rows[2])
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert names | {"lm loss validation"} <= set(events.Tags()["scalars"])
    assert events.Tags()["tensors"] == ["parameters/text_summary"]
    logged = [event.value for event in events.Scalars("lm loss")]
    assert logged == pytest.approx([rows[0]["lm loss"], rows[1]["lm loss"]])


def test_wandb_works_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run_training(tiny("train_iters=1", "wandb_project=test", f"wandb_save_dir={tmp_path}"))
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_wandb_without_a_login_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_options: object) -> None:
        raise wandb.Error("No API key configured")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(ConfigError, match=r"'p': No API key configured; run 'wandb login', or"):
        run_training(tiny("wandb_project=p", f"wandb_save_dir={tmp_path}"))


def test_only_the_chosen_steps_are_profiled(tmp_path: Path) -> None:
    chosen = ["profile=true", "profile_step_start=2", "profile_step_end=4"]
    run_training(tiny("train_iters=6", *chosen, f"profile_dir={tmp_path}"))
    trace = json.loads((tmp_path / "trace_rank0.json").read_text())
    steps = {e["name"] for e in trace["traceEvents"] if "ProfilerStep" in e.get("name", "")}
    assert steps == {"ProfilerStep#2", "ProfilerStep#3"}


def test_bf16_trains_close_to_fp32() -> None:
    half = column(run_training(tiny("train_iters=10", "bf16=true")), "lm loss")
    full = column(run_training(tiny("train_iters=10")), "lm loss")
    assert half == pytest.approx(full, abs=0.02)
    assert half != full


def test_clipped_fraction_counts_clipped_steps() -> None:
    assert column(run_training(tiny("clip_grad=1e-6")), "clipped-fraction") == [1.0] * 6
    assert column(run_training(tiny("clip_grad=1e6")), "clipped-fraction") == [0.0] * 6


def test_a_diverged_run_is_reported_and_stops() -> None:
    lines: list[str] = []
    result = run_training(tiny("train_iters=50", "lr=1e30", "clip_grad=0"), lines)
    assert result.diverged
    assert result.iteration < 50
    assert "diverged and stops without saving; lower optimizer.lr" in lines[-1]


@pytest.mark.parametrize(
    ("denominator", "count"), [(LossDenominator.TOKENS, 3), (LossDenominator.POSITIONS, 8)]
)
def test_loss_is_summed_over_tokens_and_divided_by_the_chosen_count(
    denominator: LossDenominator, count: int
) -> None:
    losses = torch.tensor([[1.0, 2.0, 4.0, 8.0], [16.0, 32.0, 64.0, 128.0]])
    mask = torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    total, divisor, report = loss_function(mask, denominator, losses)
    assert float(total) == 133.0
    assert int(divisor) == count
    assert report["lm loss"].tolist() == [133.0, 3.0]


def test_runs_follow_each_other_in_one_process_with_the_same_result() -> None:
    first, second = run_training(tiny()), run_training(tiny())
    assert column(first, "lm loss") == column(second, "lm loss")
