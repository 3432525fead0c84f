"""The coordinate check of a campaign's arm, as ``megatron-mup coord-check`` does it.

The arm keeps its rule, depth and architecture; batch, length and learning rate are those of a
coordinate check, because a training batch would hide the alignment that it looks for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from megatron_mup.config import RunConfig
from megatron_mup.config_io import config_to_dict
from megatron_mup.data.publication import publish_text
from megatron_mup.revision import revision
from megatron_mup.transfer.campaign.spec import CheckOptions
from megatron_mup.transfer.sweep.base import full_name

BODY: dict[str, Any] = {
    "model.seq_length": 32,
    "training.global_batch_size": 4,
    "training.micro_batch_size": 2,
    "optimizer.lr": 2.0**-10,
}
"""Options of the arm that a check replaces, unless ``coordinate_check.options`` does (ours: what
docs/coordinate_check.md's own defaults were measured with)."""


def check_inputs(run: RunConfig, check: CheckOptions, widths: Sequence[float]) -> dict[str, Any]:
    """What a check's result depends on.

    Args:
        run: the arm at its smallest width.
        check: the campaign's options.
        widths: of the proxies.
    """
    sections = config_to_dict(run)
    for section in ("data", "checkpoint", "logging"):
        # Random tokens are read, nothing is saved.
        sections.pop(section)
    # That of the sweep's first run, which a check replaces.
    sections["optimizer"]["lr"] = BODY["optimizer.lr"]
    options = BODY | {full_name(option): value for option, value in check.options.items()}
    return {
        "config": sections,
        "widths": list(check.widths or [round(width) for width in widths]),
        "steps": check.steps,
        "seeds": check.seeds,
        "options": options,
        # A check is of this package's rules in that megatron-core, not of the YAML alone.
        "made_by": [revision(), metadata.version("torch"), metadata.version("megatron-core")],
    }


def check_arm(inputs: dict[str, Any], folder: Path, echo: Callable[[str], None]) -> bool:
    """Run the check; writes its configuration, numbers and picture.

    Args:
        inputs: of ``check_inputs``.
        folder: for them.
        echo: receives progress and table.

    Returns:
        Whether every module is as expected.

    Raises:
        ConfigError: the widths show no slope, or an option is wrong.
    """
    # Imports torch.
    from megatron_mup.diagnostics.coordinate_check import CheckRequest, run_check
    from megatron_mup.training.processes import Launch

    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "config.yaml"
    publish_text(config, yaml.safe_dump(inputs["config"], sort_keys=False))
    overrides = [f"{option}={_text(value)}" for option, value in inputs["options"].items()]
    request = CheckRequest(
        widths=inputs["widths"],
        config=config,
        steps=inputs["steps"],
        seeds=inputs["seeds"],
        out=folder,
        overrides=overrides,
    )
    return run_check(request, echo=echo, launch=Launch())


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
