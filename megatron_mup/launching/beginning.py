"""``launch begin``: check a run, fix its configuration, and open the next attempt in its folder.

Refuses what training would refuse, in seconds and on one node, before any rank is started. The
first attempt decides what the run is: a requeued job keeps that configuration, a new job may bring
a changed one, which is told, and checked against the checkpoints as any resume is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from megatron_mup.config import RunConfig
from megatron_mup.config_io import (
    config_from_dict,
    config_to_dict,
    load_config,
    qualified,
    read_sections,
)
from megatron_mup.data.publication import publish_text
from megatron_mup.errors import ConfigError, MupError
from megatron_mup.launching.attempts import (
    BEGIN,
    Event,
    append_event,
    beginnings,
    beginnings_without_progress,
    claim_attempt,
    read_events,
    signalled_attempts,
)
from megatron_mup.launching.learning_rate import (
    LR,
    LearningRate,
    choose_learning_rate,
    rule_warnings,
)
from megatron_mup.launching.rank_environment import environment_warnings, rank_environment
from megatron_mup.launching.run_folder import RunFolder
from megatron_mup.launching.snapshot import SnapshotSource, take_snapshot
from megatron_mup.launching.source_code import find_source_code, scheduled_job
from megatron_mup.rank_outcomes import node_name
from megatron_mup.revision import revision
from megatron_mup.secrets import mask_data, secret_values

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class BeginRequest:
    """What the launch script asks for.

    Attributes:
        run_dir: the run folder; made if missing.
        config: YAML configuration.
        world_size: ranks.
        lr: peak learning rate, if given by hand.
        lr_from: file with the peak learning rate.
        job: scheduler's id of the job; None without one.
        restart: how often that job was started again.
        max_restarts: starts in a row of that job that may leave no newer checkpoint, before another
            one is refused; None: any number.
        overrides: ``key=value``.
    """

    run_dir: Path
    config: Path
    world_size: int
    lr: float | None = None
    lr_from: Path | None = None
    job: str | None = None
    restart: int = 0
    max_restarts: int | None = None
    overrides: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.max_restarts is not None and self.max_restarts < 0:
            raise ConfigError(
                f"--max-restarts is {self.max_restarts}; it must not be negative (MAX_RESTARTS)"
            )


def parse_attempt_of(text: str | None) -> tuple[str | None, int]:
    """Read ``JOBID:RESTART``.

    Raises:
        ConfigError: it is something else.
    """
    if text is None:
        return None, 0
    job, _, restart = text.partition(":")
    if not job or not (restart or "0").isdecimal():
        raise ConfigError(f"--attempt-of is '{text}'; give JOBID:RESTART, such as 4711:0")
    return job, int(restart or "0")


def begin(request: BeginRequest, environment: Mapping[str, str], say: Say) -> dict[str, str]:
    """Check the run and open an attempt.

    Args:
        request: what the launch script asks for.
        environment: of the batch script.
        say: receives warnings and what was done.

    Returns:
        Variables for the ranks.

    Raises:
        MupError: what training would refuse, or a missing learning rate.
    """
    folder = RunFolder(request.run_dir.absolute())
    events = read_events(folder)
    requeued = _same_job(request, events)
    if requeued:
        _refuse_endless_starts(request, folder, events)
    run, rate = _chosen(request, folder, requeued=requeued, say=say)
    run = _continued(run, folder, say)
    for line in rule_warnings(run, rate) if rate is not None else []:
        say(f"warning: {line}")
    for line in environment_warnings(run, environment):
        say(f"warning: {line}")
    _check(run, request.world_size, say)
    attempt = claim_attempt(folder)
    variables = rank_environment(run, folder, attempt, environment)
    text = yaml.safe_dump(config_to_dict(run), sort_keys=False)
    snapshot = _snapshot(folder, run, text, request, environment, say)
    publish_text(folder.config, text)
    append_event(
        folder,
        BEGIN,
        attempt,
        **_facts(request, folder, environment),
        **mask_data(_origin_of_rate(run, rate, events), secret_values(environment)),
        snapshot=snapshot,
    )
    return variables


def _facts(
    request: BeginRequest, folder: RunFolder, environment: Mapping[str, str]
) -> dict[str, Any]:
    return {
        "job": request.job,
        "restart": request.restart,
        "node": node_name(environment),
        "nodes": environment.get("SLURM_JOB_NODELIST"),
        "world_size": request.world_size,
        "iteration": folder.newest_checkpoint(),
        "revision": revision(),
    }


def _snapshot(
    folder: RunFolder,
    run: RunConfig,
    text: str,
    request: BeginRequest,
    environment: Mapping[str, str],
    say: Say,
) -> str:
    """Take a snapshot and tell what is new in it; its name."""
    script, job = scheduled_job(environment)
    source = SnapshotSource(
        run=run,
        config_text=text,
        # A requeued job goes on without the file that it began with.
        given=request.config if request.config.is_file() else folder.config,
        code=find_source_code(),
        environment=environment,
        script=script,
        job=job,
    )
    snapshot = take_snapshot(folder, source)
    if snapshot.changes:
        say(
            f"warning: {' and '.join(snapshot.changes)} changed since the attempt before: see "
            f"{folder.launch / snapshot.name} beside the snapshots before it"
        )
    return snapshot.name


def _resolved(
    request: BeginRequest,
    folder: RunFolder,
    sections: Mapping[str, Any],
    rate: LearningRate | None,
) -> RunConfig:
    """The configuration with its learning rate, and with places for what it writes."""
    overrides = list(request.overrides)
    if rate is not None:
        overrides.append(f"{LR}={rate.lr!r}")
    written = {qualified(override).partition("=")[0] for override in overrides}

    def with_default(section: str, key: str, value: str | None) -> None:
        options = filled.setdefault(section, {})
        if options.get(key) is None and f"{section}.{key}" not in written:
            options[key] = value

    filled = {section: dict(options) for section, options in sections.items()}
    with_default("checkpoint", "save", str(folder.root / "checkpoints"))
    with_default("logging", "metrics_path", str(folder.root / "metrics.jsonl"))
    given = [item for item in overrides if qualified(item).startswith("checkpoint.save=")]
    save = given[-1].partition("=")[2] if given else filled["checkpoint"]["save"]
    with_default("checkpoint", "load", save)
    return config_from_dict(filled, overrides, origin=str(request.config))


def _chosen(
    request: BeginRequest, folder: RunFolder, *, requeued: bool, say: Say
) -> tuple[RunConfig, LearningRate | None]:
    """What the attempt runs, and the rate that the command line gave, if that counts.

    Raises:
        MupError: the files or options are wrong, and nothing is there to go on with.
    """
    try:
        sections = read_sections(request.config)
        rate = choose_learning_rate(
            sections, request.overrides, lr=request.lr, lr_from=request.lr_from
        )
        asked = _resolved(request, folder, sections, rate)
    except MupError as error:
        if not requeued or not folder.config.is_file():
            raise
        say(f"warning: {error}; the requeued job keeps what it began with")
        return load_config(folder.config), None
    return _settled(asked, folder, requeued, say), rate


def _refuse_endless_starts(
    request: BeginRequest, folder: RunFolder, events: Sequence[Event]
) -> None:
    """Refuse another start of a job whose starts lead nowhere.

    ``decide`` counts as well, but not where the scheduler requeues a job whose own node has died.

    Raises:
        ConfigError: the job began too often at the checkpoint that is still the newest.
    """
    if request.max_restarts is None:
        return
    iteration = folder.newest_checkpoint()
    told_to_end = signalled_attempts(events)
    idle = [
        event
        for event in beginnings_without_progress(events, iteration)
        if event.get("job") == request.job and event["attempt"] not in told_to_end
    ]
    if len(idle) > request.max_restarts:
        reached = "no checkpoint" if iteration is None else f"none after iteration {iteration}"
        raise ConfigError(
            f"job {request.job} was started {len(idle)} times in a row and left {reached}; "
            f"--max-restarts (MAX_RESTARTS) allows {request.max_restarts} restarts: mend what the "
            "logs of these attempts show, and submit a new job, which continues the run"
        )


def _same_job(request: BeginRequest, events: Sequence[Event]) -> bool:
    """Whether the scheduler started a job again that has begun here before."""
    jobs = {event.get("job") for event in beginnings(events)}
    return request.job is not None and request.restart > 0 and request.job in jobs


def _settled(asked: RunConfig, folder: RunFolder, requeued: bool, say: Say) -> RunConfig:
    """What the attempt runs: the asked-for configuration, or the one that the job began with.

    Raises:
        ConfigError: the learning rate is another one, and no option allows that.
    """
    if not folder.config.is_file():
        return asked
    before = load_config(folder.config)
    changes = _changes(before, asked)
    if not changes:
        return asked
    listed = "\n  ".join(changes)
    if requeued:
        say(
            f"warning: the configuration was changed after this job began:\n  {listed}\nthe "
            "requeued job keeps what it began with; to take the changes, cancel it and submit anew"
        )
        return before
    allowed = {"lr", LR} & set(asked.checkpoint.override)
    if before.optimizer.lr != asked.optimizer.lr and not allowed:
        raise ConfigError(
            f"'{folder.root}' began with {LR}={before.optimizer.lr:g}, now {asked.optimizer.lr:g} "
            "is asked for, which would be another run: use another run folder (RUN_DIR, "
            f"--run-dir), or go on with the new rate by checkpoint.override=[{LR}]"
        )
    _refuse_while_trained(before, folder)
    say(
        f"warning: the configuration differs from the one that '{folder.root}' ran before:\n"
        f"  {listed}\nthis job runs the new one"
    )
    return asked


def _refuse_while_trained(before: RunConfig, folder: RunFolder) -> None:
    """Refuse to change the configuration under the hands of a job that runs.

    Raises:
        ConfigError: the save folder's owner gave a sign of life within the lease's time.
    """
    # Not at the top: it needs torch.
    from megatron_mup.checkpoint.lease import LEASE, owner_is_gone

    lease = folder.save_folder / LEASE
    try:
        age = time.time() - lease.stat().st_mtime
    except OSError:
        return
    if age > before.faults.lease_timeout_seconds or owner_is_gone(folder.save_folder):
        return
    raise ConfigError(
        f"'{folder.root}' is being trained (sign of life {max(0.0, age):.0f} s ago), and the "
        "configuration differs from its: wait for its end, or use another run folder (RUN_DIR, "
        "--run-dir)"
    )


def _continued(run: RunConfig, folder: RunFolder, say: Say) -> RunConfig:
    """Let a run that started from another folder's checkpoint continue its own.

    The same command would go back to where it started, which training refuses.
    """
    checkpoint = run.checkpoint
    own = folder.config.is_file() and folder.newest_checkpoint() is not None
    if not own or checkpoint.load == checkpoint.save:
        return run
    say(
        f"'{checkpoint.save}' holds this run's own checkpoints: they are continued, not "
        f"checkpoint.load '{checkpoint.load}'"
    )
    continued = replace(checkpoint, load=checkpoint.save, finetune=False, ckpt_step=None)
    return replace(run, checkpoint=continued)


def _changes(before: RunConfig, now: RunConfig) -> list[str]:
    old, new = config_to_dict(before), config_to_dict(now)
    return [
        f"{section}.{key}: {old[section][key]} -> {value}"
        for section, options in new.items()
        for key, value in options.items()
        if old[section][key] != value
    ]


def _check(run: RunConfig, world_size: int, say: Say) -> None:
    """What training checks before it starts, but for what only the ranks' machines can tell."""
    # Not at the top: these need torch, and a mistake in the options is told without it.
    from megatron_mup.checkpoint.resume import check_resumable, check_save_folder
    from megatron_mup.data.checks import check_epochs, check_training_data, repetition_warning
    from megatron_mup.training.outputs import check_outputs
    from megatron_mup.training.ranks import check_layout
    from megatron_mup.training.sample_counts import samples_after

    if world_size < 1:
        raise ConfigError(f"--world-size is {world_size}; give the number of ranks, at least 1")
    check_layout(run, world_size)
    check_outputs(run)
    check_resumable(run)
    check_save_folder(run)
    check_training_data(run)
    warning = repetition_warning(check_epochs(run, samples_after(run.training, run.planned_iters)))
    if warning is not None:
        say(warning)


def _origin_of_rate(
    run: RunConfig, rate: LearningRate | None, events: Sequence[Event]
) -> dict[str, Any]:
    """What the list of attempts remembers of the learning rate."""
    begun = beginnings(events)
    if rate is None or rate.lr != run.optimizer.lr:
        # A requeued job keeps its rate, and with it where that came from.
        same = [event for event in begun if event.get("lr") == run.optimizer.lr]
        source = same[-1].get("lr_source") if same else "the configuration"
        return {"lr": run.optimizer.lr, "lr_source": source}
    return {
        "lr": rate.lr,
        "lr_source": rate.source,
        "lr_provenance": rate.provenance,
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }
