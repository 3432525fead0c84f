"""Resuming is bit-exact, and refused under another parameterization or base shape."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_mup.checkpoint.folders import TRACKER, usable_iterations
from megatron_mup.errors import CheckpointError
from megatron_mup.training.loop import TrainData, train
from tests.checkpoint.short_runs import folders, losses, run_training
from tests.configurations import tiny
from tests.random_samples import RandomSamples

SCHEDULE = ["lr_decay_iters=60", "lr_warmup_iters=5", "weight_decay=0.01", "clip_grad=0.5"]
VARIANTS = {
    "adam": [],
    "lion": ["optimizer.optimizer=lion"],
    "groups that differ only in eps": ["output_form=multiplier", "adam_eps=1e-3"],
    "tied, batch ramp-up": [
        "untie_embeddings_and_output_weights=false",
        "output_form=multiplier",
        "rampup_batch_size=[2,2,40]",
    ],
    "bf16": ["bf16=true"],
}


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_thirty_steps_and_a_resume_equal_sixty_steps_to_the_last_bit(
    variant: str, tmp_path: Path
) -> None:
    options = [*SCHEDULE, *VARIANTS[variant]]
    whole = run_training(tiny(*options, "train_iters=60"))
    first = run_training(tiny(*options, "train_iters=30", *folders(tmp_path)))
    second = run_training(tiny(*options, "train_iters=60", *folders(tmp_path, load=True)))
    assert losses(first) + losses(second) == losses(whole)
    assert [row["grad-norm"] for row in second.history if "grad-norm" in row] == [
        row["grad-norm"] for row in whole.history[30:] if "grad-norm" in row
    ]
    assert len(losses(second)) == 30


def test_checkpoints_have_megatrons_layout(tmp_path: Path) -> None:
    run_training(tiny("train_iters=4", "save_interval=2", *folders(tmp_path)))
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {"iter_0000002", "iter_0000004", "latest_checkpointed_iteration.txt"}
    assert (tmp_path / TRACKER).read_text() == "4"
    metadata = json.loads((tmp_path / "iter_0000004" / "metadata.json").read_text())
    assert metadata["sharded_backend"] == "torch_dist"
    record = json.loads((tmp_path / "iter_0000004" / "parameterization.json").read_text())
    assert record["table"][0]["name"] == "embedding.word_embeddings.weight"
    assert record["config"]["parameterization"]["base_hidden_size"] == 32


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("base_hidden_size=16", ["base_hidden_size was 32, now 16", "lr was", "finetune"]),
        ("parameterization.name=sp", ["parameterization.name was mup, now sp"]),
        ("lr=0.5", ["lr was 0.015625, now 0.5"]),
        ("num_layers=4", ["num_layers was 2, now 4", "use the checkpoint's options"]),
        ("optimizer.optimizer=lion", ["optimizer was adam, now lion"]),
        ("adam_eps=1e-6", ["eps was 1e-08, now 1e-06"]),
        ("adam_beta2=0.99", ["adam_beta2 was 0.95, now 0.99"]),
        ("min_lr_ratio=0.1", ["min_lr_ratio was 0.0, now 0.1"]),
        ("lr_decay_style=cosine", ["lr_decay_style was linear, now cosine"]),
        ("lr_decay_iters=9", ["schedule ended at iteration 8, now at 9", "lr_decay_iters=8"]),
        ("train_iters=20", ["shuffled for 8 iterations, now for 20"]),
        ("seed=5", ["seed was 1234, now 5"]),
        ("bf16=true", ["bf16 was False, now True"]),
        ("global_batch_size=8", ["global_batch_size was 4, now 8"]),
        ("seq_length=8", ["seq_length was 16, now 8"]),
    ],
)
def test_resuming_another_run_prints_the_difference(
    change: str, words: list[str], tmp_path: Path
) -> None:
    options = ["lr_decay_iters=8", "train_iters=2"]
    run_training(tiny(*options, "train_iters=1", *folders(tmp_path)))
    with pytest.raises(CheckpointError) as error:
        run_training(tiny(*options, change, *folders(tmp_path, load=True)))
    for word in words:
        assert word in str(error.value)


def test_a_run_with_a_constant_schedule_can_be_made_longer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    constant = ["lr_decay_style=constant", "lr_warmup_iters=2"]
    whole = run_training(tiny(*constant, "train_iters=6"))
    first = run_training(tiny(*constant, "train_iters=3", *folders(tmp_path)))
    second = run_training(tiny(*constant, "train_iters=6", *folders(tmp_path, load=True)))
    assert losses(first) + losses(second) == losses(whole)
    assert "data was shuffled for 3 iterations, now for 6" in caplog.text


def test_layout_logging_and_evaluation_may_change_on_resume(tmp_path: Path) -> None:
    options = ["lr_decay_iters=8", "train_iters=2"]
    run_training(tiny(*options, "train_iters=1", *folders(tmp_path)))
    changes = ["micro_batch_size=4", "log_interval=5", "eval_iters=2", "attention_backend=local"]
    result = run_training(tiny(*options, *changes, *folders(tmp_path, load=True)))
    assert result.iteration == 2


def test_a_finished_run_says_that_nothing_is_left(tmp_path: Path) -> None:
    run_training(tiny("train_iters=2", *folders(tmp_path)))
    lines: list[str] = []
    samples = RandomSamples(96, 16)
    run = tiny("train_iters=2", *folders(tmp_path, load=True))
    train(run, data=TrainData(samples), echo=lines.append)
    assert "iteration 2 and train_iters is 2: nothing left to train" in lines[-1]


@pytest.mark.parametrize("precision", ["bf16=false", "bf16=true"])
def test_finetuning_takes_the_weights_and_starts_everything_else_anew(
    precision: str, tmp_path: Path
) -> None:
    first = run_training(tiny("train_iters=20", precision, *folders(tmp_path)))
    options = ["lr=0.001", f"load={tmp_path}", "finetune=true"]
    tuned = run_training(tiny("train_iters=2", precision, *options))
    assert tuned.history[0]["iteration"] == 1
    assert tuned.history[0]["learning-rate"] == 0.001
    # Both steps of the new run see the trained weights, far below the fresh loss; the second one
    # would not if the fp32 main weights of bf16 training were still the fresh ones.
    assert max(losses(tuned)) < losses(first)[0] - 0.1


def test_finetuning_under_another_logit_multiplier_is_refused(tmp_path: Path) -> None:
    run_training(tiny("train_iters=1", *folders(tmp_path)))
    with pytest.raises(CheckpointError, match=r"forward_mult was 1\.0, now 0\.5"):
        run_training(
            tiny("train_iters=1", "output_form=multiplier", f"load={tmp_path}", "finetune=true")
        )


@pytest.mark.parametrize("change", ["logit_multiplier=4", "base_hidden_size=16"])
def test_finetuning_a_tied_model_under_another_logit_multiplier_is_refused(
    change: str, tmp_path: Path
) -> None:
    tied = [
        "untie_embeddings_and_output_weights=false",
        "output_form=multiplier",
        "init=sigma",
        "train_iters=1",
    ]
    run_training(tiny(*tied, *folders(tmp_path)))
    with pytest.raises(CheckpointError, match=r"logit multiplier was 0\.5, now"):
        run_training(tiny(*tied, change, f"load={tmp_path}", "finetune=true"))


@pytest.mark.parametrize("load", [[], ["load={folder}", "finetune=true"]])
def test_saving_into_the_folder_of_another_run_is_refused(load: list[str], tmp_path: Path) -> None:
    run_training(tiny("train_iters=2", *folders(tmp_path)))
    options = [option.format(folder=tmp_path) for option in load]
    with pytest.raises(CheckpointError, match=r"already holds iteration 2 .* or save elsewhere"):
        run_training(tiny("train_iters=1", *options, *folders(tmp_path)))
    assert (tmp_path / TRACKER).read_text() == "2"


def test_the_log_says_where_the_weights_come_from(tmp_path: Path) -> None:
    samples = RandomSamples(96, 16)
    lines: list[str] = []
    run = tiny("train_iters=2", "lr_decay_iters=3", *folders(tmp_path, load=True))
    train(run, data=TrainData(samples), echo=lines.append)
    assert f"'{tmp_path}' holds no checkpoint: starting from scratch" in lines
    run = tiny("train_iters=3", *folders(tmp_path, load=True))
    train(run, data=TrainData(samples), echo=lines.append)
    assert f"resuming from '{tmp_path}' at iteration 2" in lines


def test_naming_one_checkpoint_instead_of_its_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is one checkpoint; give the folder that holds it"):
        run_training(tiny(f"load={tmp_path / 'iter_0000002'}"))


def test_a_cut_checkpoint_without_another_one_is_an_error(tmp_path: Path) -> None:
    run_training(tiny("train_iters=1", "lr_decay_iters=2", *folders(tmp_path)))
    (data,) = (tmp_path / "iter_0000001").glob("*.distcp")
    data.write_bytes(data.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=rf"{data.name} has 1000 bytes instead of \d{{7}}\."):
        run_training(tiny("train_iters=2", *folders(tmp_path, load=True)))


def test_an_empty_folder_starts_from_scratch_as_in_megatron(tmp_path: Path) -> None:
    result = run_training(tiny("train_iters=1", f"load={tmp_path}"))
    assert result.iteration == 1


def test_a_tracker_without_any_checkpoint_is_an_error(tmp_path: Path) -> None:
    (tmp_path / TRACKER).write_text("7")
    with pytest.raises(CheckpointError, match=r"names iteration 7 but no iter_\* folder is there"):
        usable_iterations(tmp_path)


def test_a_folder_with_only_an_unfinished_checkpoint_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "iter_0000007").mkdir()
    with pytest.raises(CheckpointError, match=r"iter_0000007 is incomplete"):
        usable_iterations(tmp_path)


def test_a_diverged_run_saves_no_checkpoint_of_its_wreck(tmp_path: Path) -> None:
    broken = ["train_iters=50", "lr=1e30", "clip_grad=0", "log_interval=10", "save_interval=1"]
    result = run_training(tiny(*broken, *folders(tmp_path)))
    assert result.diverged
    saved = max(usable_iterations(tmp_path), default=0)
    # The step whose gradient was not finite is the last one, and is not saved.
    assert saved < result.iteration < 10
    for row in result.history:
        assert row["iteration"] == result.iteration
