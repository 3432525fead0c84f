"""Stands in for training on the first rank: reads, goes on and saves as training does, no model.

An iteration is a moment and a line in the metrics; a checkpoint is the real record, which the test
has prepared, with its checksum. Signals end it as they end training: saved, code 75. The loss is
lowest, 4, at a learning rate of 2^-6.

From the environment: STUB_CHECKS (set: refuse what the product's dry run for all ranks of the step
refuses), STUB_LAST (the last iteration that this start reaches) and STUB_CODE (with which it then
ends before the run's end). Imports torch for STUB_CHECKS alone: it is started often.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

from megatron_mup.config import RunConfig
from megatron_mup.config_io import load_config
from megatron_mup.errors import MupError
from megatron_mup.exit_codes import FINISHED, STOPPED_SAVED, USER_ERROR
from megatron_mup.status import RunState, Status, write_status

SECONDS_PER_ITERATION = 0.1
RECORD = "parameterization.json"


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("--ended", type=Path, required=True)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    try:
        run = load_config(options.config, options.overrides)
        if "STUB_CHECKS" in os.environ:
            check(run)
        code = act(run, options.record.read_bytes())
    except MupError as error:
        sys.stderr.write(f"error: {error}\n")
        code = USER_ERROR
    # The other ranks leave with this one.
    options.ended.write_text(str(code))
    return code


def check(run: RunConfig) -> None:
    """Refuse what training would refuse on machines that have the GPUs."""
    from megatron_mup.checkpoint.resume import check_resumable, check_save_folder
    from megatron_mup.dry_run import dry_run
    from megatron_mup.training.outputs import check_outputs

    check_outputs(run)
    check_resumable(run)
    check_save_folder(run)
    dry_run(run, world_size=int(os.environ["SLURM_STEP_NUM_TASKS"]))


def act(run: RunConfig, record: bytes) -> int:
    """Iterate from the newest checkpoint to an end; returns the exit code."""
    received: list[int] = []
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda number, _frame: received.append(number))
    assert run.checkpoint.save is not None
    assert run.logging.metrics_path is not None
    root = Path(run.checkpoint.save)
    iteration = max((int(path.name[5:]) for path in root.glob("iter_???????")), default=0)
    sys.stderr.write(f"stand-in starts at iteration {iteration}\n")
    length = run.training.train_iters
    last = min(length, int(os.environ.get("STUB_LAST", length)))
    with Path(run.logging.metrics_path).open("a") as metrics:
        while iteration < last and not received:
            time.sleep(SECONDS_PER_ITERATION)
            iteration += 1
            metrics.write(json.dumps({"iteration": iteration, "lm loss": 1 / iteration}) + "\n")
            metrics.flush()
            if run.checkpoint.save_interval and iteration % run.checkpoint.save_interval == 0:
                save(root, iteration, record)
    if "STUB_CODE" in os.environ and iteration < length and not received:
        return int(os.environ["STUB_CODE"])
    save(root, iteration, record)
    report(run, root, iteration)
    return STOPPED_SAVED if received else FINISHED


def report(run: RunConfig, root: Path, iteration: int) -> None:
    """Write the status of a run that has come to an end."""
    assert run.optimizer.lr is not None
    now = time.time()
    status = Status(
        state=RunState.FINISHED if iteration == run.training.train_iters else RunState.STOPPED,
        iteration=iteration,
        train_iters=run.training.train_iters,
        log_interval=1,
        lease_timeout_seconds=60.0,
        world_size=int(os.environ["SLURM_STEP_NUM_TASKS"]),
        host="stand-in",
        pid=os.getpid(),
        job_id=os.environ["SLURM_JOB_ID"],
        revision="stand-in",
        started=now,
        updated=now,
        metrics={"lm loss": 4 + (math.log2(run.optimizer.lr) + 6) ** 2},
        last_checkpoint=iteration,
    )
    write_status(root, status)


def save(root: Path, iteration: int, record: bytes) -> None:
    """Publish a checkpoint, unless it is there."""
    final = root / f"iter_{iteration:07d}"
    if final.exists():
        return
    temporary = final.with_name(final.name + ".tmp")
    temporary.mkdir(parents=True)
    (temporary / RECORD).write_bytes(record)
    digest = {"bytes": len(record), "sha256": hashlib.sha256(record).hexdigest()}
    checksums = {"format": 1, "files": {RECORD: digest}}
    (temporary / "checksums.json").write_text(json.dumps(checksums))
    temporary.rename(final)


if __name__ == "__main__":
    sys.exit(main())
