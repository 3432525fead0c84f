"""``launch/snapshot``: what a run was made of, copied beside it, so that it can be made again.

    code.tar.gz         the files of the checkout's commit, or of the installed package
    uncommitted.diff    how the tracked files differed from that commit
    config.given.yaml   the configuration as the user wrote it
    config.yaml         the same with all options, learning rate and places
    parameters.txt      the parameter table; parameters.csv has every row
    packages.txt        installed packages; requirements.lock of the checkout beside it
    environment.txt     variables of the libraries and the scheduler
    script.sh, job.txt  the batch script and what the scheduler knows of the job
    snapshot.json       what the others were made from; what was left out or masked

Made in a temporary folder and renamed. A later attempt that has other code or another configuration
makes ``snapshot-0002`` and so on. ``secrets`` decides what may not be copied. Must not import torch
or megatron.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from megatron_mup.config import RunConfig
from megatron_mup.data.publication import sync_folder
from megatron_mup.describe import describe_run
from megatron_mup.errors import ConfigError
from megatron_mup.launching.run_folder import RunFolder
from megatron_mup.launching.source_code import SourceCode
from megatron_mup.parameterization.table import JSON_KEYS
from megatron_mup.secrets import (
    is_secret_file,
    is_secret_name,
    mask_code,
    mask_text,
    secret_values,
)

ALLOWED_PREFIXES = (
    "SLURM_",
    "NCCL_",
    "TORCH_",
    "PYTORCH_",
    "CUDA_",
    "NVTE_",
    "OMP_",
    "MKL_",
    "MEGATRON_",
    "UCX_",
    "FI_",
    "GLOO_",
    "CUBLAS_",
    "CUDNN_",
    "TRITON_",
)
"""Beginnings of the names of environment variables that are kept; all others are left out."""

_DIFFERENCES = ("code", "config", "packages")


@dataclass(frozen=True, kw_only=True)
class SnapshotSource:
    """What a snapshot is made of.

    Attributes:
        run: the resolved configuration.
        config_text: the same as YAML.
        given: the configuration file of the user.
        code: of this package.
        environment: of the batch script.
        script: the batch script; None without one.
        job: what the scheduler knows of the job; None without one.
    """

    run: RunConfig
    config_text: str
    given: Path
    code: SourceCode
    environment: Mapping[str, str]
    script: str | None = None
    job: str | None = None


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A snapshot in the run folder.

    Attributes:
        name: its folder below ``launch``.
        changes: what differs from the one before, in words; None for the first, empty if nothing.
    """

    name: str
    changes: tuple[str, ...] | None


def take_snapshot(folder: RunFolder, source: SnapshotSource) -> Snapshot:
    """Copy what the run is made of, unless the latest snapshot holds just that.

    Args:
        folder: of the run.
        source: what to copy.

    Raises:
        ConfigError: the run folder cannot be written.
    """
    identity = _identity(source)
    before = _latest(folder)
    if before is not None:
        name, old = before
        changed = tuple(what for what in _DIFFERENCES if old.get(what) != identity[what])
        if not changed:
            return Snapshot(name=name, changes=())
    else:
        changed = ()
    try:
        name = _publish(folder, source, identity)
    except OSError as error:
        raise ConfigError(
            f"cannot write the snapshot in '{folder.launch}': {error.strerror or error}; give a "
            "--run-dir with room"
        ) from error
    return Snapshot(name=name, changes=None if before is None else changed)


def snapshots(folder: RunFolder) -> list[str]:
    """Names of the snapshots, oldest first."""
    found = [path.parent.name for path in folder.launch.glob("snapshot*/snapshot.json")]
    return sorted(found)


def _latest(folder: RunFolder) -> tuple[str, Mapping[str, object]] | None:
    names = snapshots(folder)
    if not names:
        return None
    try:
        data = json.loads((folder.launch / names[-1] / "snapshot.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        data = {}
    return names[-1], data.get("identity", {}) if isinstance(data, dict) else {}


def _identity(source: SnapshotSource) -> dict[str, str]:
    return {
        "code": source.code.identity,
        "config": hashlib.sha256(source.config_text.encode()).hexdigest(),
        "packages": hashlib.sha256(installed_packages().encode()).hexdigest(),
    }


def _publish(folder: RunFolder, source: SnapshotSource, identity: Mapping[str, str]) -> str:
    """Write all files into a temporary folder and give it the next free name."""
    folder.launch.mkdir(parents=True, exist_ok=True)
    temporary = folder.launch / f".snapshot.{os.uname().nodename}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        _write_files(temporary, source, identity)
        sync_folder(temporary)
        number = len(snapshots(folder)) + 1
        while True:
            name = "snapshot" if number == 1 else f"snapshot-{number:04d}"
            try:
                # Fails on a folder with files in it: another process was faster.
                os.rename(temporary, folder.launch / name)
            except OSError:
                if not (folder.launch / name).exists():
                    raise
                number += 1
                continue
            sync_folder(folder.launch)
            return name
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_files(folder: Path, source: SnapshotSource, identity: Mapping[str, str]) -> None:
    values = secret_values(source.environment)

    def write(name: str, text: str | None) -> None:
        if text is not None:
            (folder / name).write_text(mask_text(text, values), encoding="utf-8")

    left_out, masked = _write_code(folder / "code.tar.gz", source.code, values)
    write("uncommitted.diff", source.code.difference)
    write("config.given.yaml", source.given.read_text(encoding="utf-8", errors="replace"))
    write("config.yaml", source.config_text)
    write("requirements.lock", source.code.lock)
    write("script.sh", source.script)
    write("job.txt", source.job)
    # These three hold no text of the user's.
    (folder / "packages.txt").write_text(installed_packages(), encoding="utf-8")
    (folder / "parameters.txt").write_text(describe_run(source.run) + "\n", encoding="utf-8")
    (folder / "parameters.csv").write_text(_table(source.run), encoding="utf-8")
    (folder / "environment.txt").write_text(
        kept_environment(source.environment, values), encoding="utf-8"
    )
    about = {
        "identity": dict(identity),
        "revision": source.code.revision,
        "origin": None if source.code.origin is None else mask_text(source.code.origin, values),
        "left_out": left_out,
        "masked": masked,
        "untracked": [name for name in source.code.untracked if not is_secret_file(name)],
    }
    (folder / "snapshot.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def _write_code(path: Path, code: SourceCode, values: list[str]) -> tuple[int, list[str]]:
    """Pack the files that may be copied.

    Returns:
        How many files were left out for their names, and names of those that are masked.
    """
    left_out, masked = 0, []
    with tarfile.open(path, "w:gz", compresslevel=6) as archive:
        for name, content, mode in code.files():
            if is_secret_file(name):
                left_out += 1
                continue
            kept = _masked_content(content, lambda text: mask_code(text, values))
            if kept != content:
                masked.append(name)
            member = tarfile.TarInfo(f"code/{name}")
            member.size, member.mode = len(kept), mode
            archive.addfile(member, io.BytesIO(kept))
    return left_out, masked


def _masked_content(content: bytes, mask: Callable[[str], str]) -> bytes:
    # Bytes that are no text pass through: a picture has no variables.
    return mask(content.decode("utf-8", errors="surrogateescape")).encode(
        "utf-8", errors="surrogateescape"
    )


def kept_environment(environment: Mapping[str, str], values: list[str]) -> str:
    """The variables that may be kept, one a line.

    Args:
        environment: of the batch script.
        values: from ``secret_values``.
    """
    lines = [
        f"{name}={mask_text(value, values)}"
        for name, value in sorted(environment.items())
        if name.startswith(ALLOWED_PREFIXES) and not is_secret_name(name)
    ]
    return "\n".join([*lines, ""])


@functools.cache
def installed_packages() -> str:
    """Every installed distribution with its version, as ``pip freeze`` has them, without URLs."""
    found = set()
    for distribution in metadata.distributions():
        # Read once: each access parses the file anew.
        about = distribution.metadata
        if about["Name"]:
            found.add(f"{about['Name']}=={about['Version']}")
    return "\n".join([*sorted(found, key=str.lower), ""])


def _table(run: RunConfig) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, JSON_KEYS, lineterminator="\n")
    writer.writeheader()
    for row in run.table.to_json():
        shape = row["shape"]
        shown = "x".join(map(str, shape)) if isinstance(shape, list) else shape
        writer.writerow({**row, "shape": shown})
    return text.getvalue()
