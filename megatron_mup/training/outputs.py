"""Check that everything a run will write can be written, before it starts."""

from __future__ import annotations

import tempfile
from pathlib import Path

from megatron_mup.config import RunConfig
from megatron_mup.errors import ConfigError


def check_outputs(run: RunConfig) -> None:
    """Make the output folders and try to write to each.

    Args:
        run: the run's configuration.

    Raises:
        ConfigError: a folder cannot be made or written, or a file's name is a folder.
    """
    metrics = run.logging.metrics_path
    if metrics is not None and Path(metrics).is_dir():
        raise ConfigError(
            f"logging.metrics_path '{metrics}' is a folder; give the name of a JSON lines file"
        )
    dynamics = run.logging.diagnostics_path
    folders = {
        "checkpoint.save": run.checkpoint.save,
        "logging.metrics_path": None if metrics is None else str(Path(metrics).parent),
        "logging.diagnostics_path": None if dynamics is None else str(Path(dynamics).parent),
        "logging.tensorboard_dir": run.logging.tensorboard_dir,
        "logging.wandb_save_dir": run.logging.wandb_save_dir,
        "training.profile_dir": run.training.profile_dir if run.training.profile else None,
        "data.data_cache_path": run.data.data_cache_path,
    }
    for option, folder in folders.items():
        if folder is not None:
            _try_to_write(option, Path(folder))


def _try_to_write(option: str, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # The file has no name of its own and is gone when closed.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"cannot write to '{folder}' of {option}: {error.strerror or error}; give a folder "
            "that can be written"
        ) from error
