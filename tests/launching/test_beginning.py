"""``launch begin``: what is refused, what the ranks get, and what a second start may change."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_mup.config_io import load_config
from megatron_mup.errors import CheckpointError, ConfigError, DataError, MupError
from megatron_mup.launching import beginning
from megatron_mup.launching.attempts import append_event
from megatron_mup.launching.beginning import parse_attempt_of
from megatron_mup.launching.run_folder import RunFolder
from megatron_mup.launching.source_code import find_source_code
from tests.launching.run_folders import began, checkpoint, events, write_config


@pytest.fixture(autouse=True)
def _small_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Snapshots of one file instead of this checkout."""
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(beginning, "find_source_code", lambda: find_source_code(package))


def resolved(run_dir: Path) -> dict[str, Any]:
    run = load_config(run_dir / "launch" / "config.yaml")
    return {
        "lr": run.optimizer.lr,
        "save": run.checkpoint.save,
        "load": run.checkpoint.load,
        "metrics": run.logging.metrics_path,
        "iters": run.training.train_iters,
    }


def test_the_ranks_read_a_whole_configuration_with_places_in_the_run_folder(
    config: Path, tmp_path: Path
) -> None:
    # A section that needs checkpoint.save is no reason to ask for it.
    run_dir = tmp_path / "my run"
    began(config, run_dir, "save_interval=3")
    assert resolved(run_dir) == {
        "lr": 0.015625,
        "save": f"{run_dir}/checkpoints",
        "load": f"{run_dir}/checkpoints",
        "metrics": f"{run_dir}/metrics.jsonl",
        "iters": 6,
    }


def test_places_that_the_user_chose_stay(config: Path, tmp_path: Path) -> None:
    save = str(tmp_path / "elsewhere")
    began(config, tmp_path / "run", f"checkpoint.save={save}", f"metrics_path={tmp_path}/m.jsonl")
    found = resolved(tmp_path / "run")
    assert (found["save"], found["load"]) == (save, save)
    assert found["metrics"] == f"{tmp_path}/m.jsonl"
    config = write_config(
        tmp_path, checkpoint={"save": save, "load": "/base"}, logging={"metrics_path": save + "/m"}
    )
    began(config, tmp_path / "second")
    found = resolved(tmp_path / "second")
    assert (found["save"], found["load"], found["metrics"]) == (save, "/base", save + "/m")


def test_an_attempt_is_numbered_and_remembered(config: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    first = began(config, run_dir, job="11", restart=0)
    checkpoint(run_dir, 3)
    # A checkpoint that only counts: nothing of it is read before the ranks do.
    second = {}
    with pytest.raises(CheckpointError):
        second = began(config, run_dir, job="11", restart=1)
    assert first["MEGATRON_MUP_ATTEMPT"] == "1"
    assert first["MEGATRON_MUP_OUTCOMES"] == f"{run_dir}/launch/outcomes/0001"
    assert second == {}
    (event,) = events(run_dir)
    assert {key: event[key] for key in ("event", "attempt", "job", "restart", "world_size")} == {
        "event": "begin",
        "attempt": 1,
        "job": "11",
        "restart": 0,
        "world_size": 1,
    }
    assert (event["lr"], event["lr_source"]) == (0.015625, "--lr 0.015625")
    assert (event["iteration"], event["snapshot"]) == (None, "snapshot")


@pytest.mark.parametrize(
    ("overrides", "request_changes", "kind", "message"),
    [
        (("train_itres=3",), {}, ConfigError, "did you mean 'training.train_iters'"),
        ((), {"world_size": 3}, ConfigError, "global_batch_size 4 is not divisible"),
        ((), {"world_size": 0}, ConfigError, "--world-size is 0"),
        (("tensor_model_parallel_size=2",), {}, ConfigError, "cannot hold"),
        (("train_data_path=[/nowhere/shard]",), {}, DataError, "/nowhere/shard"),
        (("vocab_size=64",), {}, DataError, "model.vocab_size"),
        (("max_epochs=0.01",), {}, DataError, "the training data runs out"),
        (("metrics_path=/proc/nowhere/m.jsonl",), {}, ConfigError, "logging.metrics_path"),
        (("checkpoint.load=/tmp/x/iter_0000003",), {}, CheckpointError, "one checkpoint"),
        ((), {"lr": None}, ConfigError, "no peak learning rate"),
    ],
)
def test_what_training_would_refuse_is_refused_before_anything_is_made(
    overrides: tuple[str, ...],
    request_changes: dict[str, Any],
    kind: type[MupError],
    message: str,
    config: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        began(config, tmp_path / "run", *overrides, **request_changes)
    assert not (tmp_path / "run" / "launch").exists()


def test_a_second_rate_for_the_same_run_is_refused_unless_it_is_allowed_by_name(
    config: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    began(config, run_dir, job="1")
    with pytest.raises(ConfigError, match=r"began with optimizer.lr=0.015625, now 0.5 .*override"):
        began(config, run_dir, lr=0.5, job="2")
    assert resolved(run_dir)["lr"] == 0.015625
    said: list[str] = []
    began(config, run_dir, "checkpoint.override=[optimizer.lr]", lr=0.5, job="2", said=said)
    assert resolved(run_dir)["lr"] == 0.5
    assert "optimizer.lr: 0.015625 -> 0.5" in "\n".join(said)


def test_a_requeued_job_keeps_what_it_began_with_though_the_file_changed(
    config: Path, tmp_path: Path
) -> None:
    run_dir, said = tmp_path / "run", list[str]()
    began(config, run_dir, job="7")
    data = json.loads(config.read_text())
    data["training"]["train_iters"] = 9
    config.write_text(json.dumps(data))
    began(config, run_dir, lr=0.5, job="7", restart=1, said=said)
    assert (resolved(run_dir)["iters"], resolved(run_dir)["lr"]) == (6, 0.015625)
    text = "\n".join(said)
    assert "training.train_iters: 6 -> 9" in text
    assert "the requeued job keeps what it began with" in text
    assert events(run_dir)[-1]["lr_source"] == "--lr 0.015625"


@pytest.mark.parametrize("trouble", ["no rate", "no file", "no YAML", "unknown option"])
def test_a_requeued_job_goes_on_though_what_it_began_with_is_gone_or_damaged(
    trouble: str, config: Path, tmp_path: Path
) -> None:
    run_dir, said, tuned = tmp_path / "run", list[str](), tmp_path / "best.yaml"
    tuned.write_text("lr: 0.25\nparameterization: {name: rel_mup}\n")
    began(config, run_dir, lr=None, lr_from=tuned, job="7")
    if trouble == "no rate":
        tuned.unlink()
    elif trouble == "no file":
        config.unlink()
    else:
        config.write_text("model: [" if trouble == "no YAML" else '{"model": {"hiden_size": 3}}')
    with pytest.raises(MupError):
        began(config, run_dir, lr=None, lr_from=tuned, job="8")
    began(config, run_dir, lr=None, lr_from=tuned, job="7", restart=1, said=said)
    (line,) = said
    assert line.startswith("warning: ")
    assert line.endswith("; the requeued job keeps what it began with")
    assert (resolved(run_dir)["lr"], resolved(run_dir)["iters"]) == (0.25, 6)
    assert events(run_dir)[-1]["lr_source"] == f"--lr-from {tuned}"


def test_a_snapshot_without_the_given_file_holds_what_the_job_began_with(
    config: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    began(config, run_dir, job="7")
    config.unlink()
    shutil.rmtree(run_dir / "launch" / "snapshot")
    began(config, run_dir, job="7", restart=1)
    given = (run_dir / "launch" / "snapshot" / "config.given.yaml").read_text()
    assert "train_iters: 6" in given


def test_a_job_that_the_scheduler_starts_again_and_again_without_progress_is_refused(
    config: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    for restart in (0, 1):
        began(config, run_dir, job="7", restart=restart, max_restarts=1)
    with pytest.raises(
        ConfigError,
        match=r"job 7 was started 2 times in a row and left no checkpoint; --max-restarts "
        r"\(MAX_RESTARTS\) allows 1 restarts: .*submit a new job",
    ):
        began(config, run_dir, job="7", restart=2, max_restarts=1)
    # No limit, another job, progress, or an end by a signal.
    began(config, run_dir, job="7", restart=2)
    began(config, run_dir, job="8", max_restarts=1)
    began(config, run_dir, job="8", restart=1, max_restarts=1)


def test_starts_that_a_signal_ended_are_not_counted_by_begin(config: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    for restart in (0, 1, 2):
        began(config, run_dir, job="7", restart=restart, max_restarts=1)
        append_event(RunFolder(run_dir), "decide", restart + 1, signalled=True)
    began(config, run_dir, job="7", restart=3, max_restarts=0)
    with pytest.raises(ConfigError, match="started 1 times in a row"):
        began(config, run_dir, job="7", restart=4, max_restarts=0)


def test_a_newer_checkpoint_starts_begin_s_count_anew(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import megatron_mup.checkpoint.resume as module

    monkeypatch.setattr(module, "check_resumable", lambda run: None)
    run_dir = tmp_path / "run"
    began(config, run_dir, job="7", max_restarts=0)
    checkpoint(run_dir, 3)
    began(config, run_dir, job="7", restart=1, max_restarts=0)
    with pytest.raises(ConfigError, match="left none after iteration 3"):
        began(config, run_dir, job="7", restart=2, max_restarts=0)


def test_secrets_of_a_rate_s_origin_are_not_kept(config: Path, tmp_path: Path) -> None:
    tuned = tmp_path / "best.yaml"
    tuned.write_text("lr: 0.25\nprovenance: {from: 'https://me:s3cr3t@host/sweep', runs: 5}\n")
    began(config, tmp_path / "run", lr=None, lr_from=tuned)
    (event,) = events(tmp_path / "run")
    assert event["lr_provenance"] == {"from": "https://***@host/sweep", "runs": 5}


def test_a_new_job_takes_the_changed_file_and_says_so(config: Path, tmp_path: Path) -> None:
    run_dir, said = tmp_path / "run", list[str]()
    began(config, run_dir, job="7")
    began(config, run_dir, "train_iters=9", job="8", said=said)
    assert resolved(run_dir)["iters"] == 9
    assert "training.train_iters: 6 -> 9\nthis job runs the new one" in "\n".join(said)
    assert "config changed since the attempt before" in "\n".join(said)


def test_an_unchanged_restart_says_nothing(config: Path, tmp_path: Path) -> None:
    run_dir, said = tmp_path / "run", list[str]()
    first: list[str] = []
    began(config, run_dir, job="7", said=first)
    began(config, run_dir, job="7", restart=1, said=said)
    began(config, run_dir, job="8", said=said)
    assert first == said == []


def test_a_configuration_is_not_changed_under_a_job_that_lives(
    config: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    began(config, run_dir, job="7")
    lease = run_dir / "checkpoints" / "lease.json"
    lease.write_text("{}")
    with pytest.raises(ConfigError, match="is being trained"):
        began(config, run_dir, "train_iters=9", job="8")
    assert resolved(run_dir)["iters"] == 6
    # The usual 120 seconds of faults.lease_timeout_seconds are over.
    os.utime(lease, (time.time() - 130, time.time() - 130))
    began(config, run_dir, "train_iters=9", job="8")
    assert resolved(run_dir)["iters"] == 9


def test_a_start_from_another_folder_continues_its_own_checkpoints_later(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import megatron_mup.checkpoint.resume as module

    # What the checkpoint holds does not matter here, only which folder is taken.
    monkeypatch.setattr(module, "check_resumable", lambda run: None)
    run_dir, base = tmp_path / "run", str(tmp_path / "base")
    options = (f"checkpoint.load={base}", "checkpoint.finetune=true")
    began(config, run_dir, *options, job="7")
    assert resolved(run_dir)["load"] == base
    checkpoint(run_dir, 3)
    began(config, run_dir, *options, job="7", restart=1)
    found = load_config(run_dir / "launch" / "config.yaml").checkpoint
    assert (found.load, found.finetune) == (f"{run_dir}/checkpoints", False)


def test_a_warning_of_another_rule_reaches_the_user(config: Path, tmp_path: Path) -> None:
    tuned = tmp_path / "best.yaml"
    tuned.write_text("lr: 0.25\nparameterization: {name: abs_mup}\nprovenance: campaign 5\n")
    said: list[str] = []
    began(config, tmp_path / "run", lr=None, lr_from=tuned, said=said)
    # Width 64 under the relative rule with base 32: alpha / 2, not alpha / 64.
    assert re.search(r"ffn_in +0.03125", "\n".join(said))
    (event,) = events(tmp_path / "run")
    assert (event["lr"], event["lr_source"]) == (0.25, f"--lr-from {tuned}")
    assert event["lr_provenance"] == "campaign 5"


@pytest.mark.parametrize("text", ["", ":1", "11:x", "11:-1"])
def test_an_attempt_is_named_by_job_and_restart(text: str) -> None:
    assert parse_attempt_of("11:2") == ("11", 2)
    assert parse_attempt_of("11") == ("11", 0)
    assert parse_attempt_of(None) == (None, 0)
    with pytest.raises(ConfigError, match="give JOBID:RESTART"):
        parse_attempt_of(text)


def test_repeated_data_is_told(tmp_path: Path) -> None:
    said: list[str] = []
    config = write_config(tmp_path, training={"train_iters": 60})
    began(config, tmp_path / "run", said=said)
    assert "training repeats its data" in "\n".join(said)


def test_a_relative_path_of_data_that_is_not_there_is_told_in_full(
    tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        DataError, match=rf"^no file shards/x.bin \({re.escape(str(tmp_path))}/shards/x.bin\);"
    ):
        began(config, tmp_path / "run", "data.train_data_path=[0.5,./shards/x]")
    with pytest.raises(DataError) as absolute:
        began(config, tmp_path / "run", "data.train_data_path=[/nowhere/x]")
    assert "(/nowhere" not in str(absolute.value)
