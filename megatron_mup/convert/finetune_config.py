"""The configuration with which a run starts from converted weights, as a file beside them.

Holds the options of the checkpoint that differ from their defaults, so that ``train --config``
builds the same model under the same parameterization. What the weights do not say (data, learning
rate, length, batch) is a placeholder that a comment names.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import yaml

from megatron_mup.config import RunConfig
from megatron_mup.config_io import config_to_dict
from megatron_mup.data.publication import publish_text

FINETUNE_FILE = "finetune.yaml"

_SECTIONS = ("model", "parameterization", "optimizer", "schedule", "training", "precision", "data")
_COMMENT = (
    "# A run that starts from the weights beside this file: megatron-mup train --config THIS_FILE\n"
    "# Yours to set before: data (no valid_data_path needs training.eval_iters: 0), optimizer.lr,\n"
    "# schedule, training, checkpoint.save.\n"
)


def write_finetune_config(root: Path, run: RunConfig) -> Path:
    """Write the configuration of a run that starts from a checkpoint.

    Args:
        root: the folder for ``checkpoint.load``.
        run: the configuration of the checkpoint's record.

    Returns:
        The file.

    Raises:
        OSError: it cannot be written.
    """
    path = root / FINETUNE_FILE
    plain = config_to_dict(run)
    said = {name: _said(plain[name], getattr(run, name)) for name in _SECTIONS}
    sections = {name: options for name, options in said.items() if options}
    # Absolute: a run is started from anywhere.
    sections["checkpoint"] = {"load": str(root.absolute()), "finetune": True}
    publish_text(path, _COMMENT + yaml.safe_dump(sections, sort_keys=False))
    return path


def _said(options: dict[str, Any], section: Any) -> dict[str, Any]:
    """The options of a section that are not at their default."""
    defaults = {item.name: _default(item) for item in dataclasses.fields(section)}
    return {
        name: value for name, value in options.items() if getattr(section, name) != defaults[name]
    }


def _default(item: dataclasses.Field[Any]) -> Any:
    made = item.default_factory
    return item.default if made is dataclasses.MISSING else made()
