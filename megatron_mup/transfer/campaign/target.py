"""The files of the target run: its configuration and the prediction that ``LR_FROM`` takes.

A prediction is written with its interval and where it comes from, never as a bare number.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_mup.config import RunConfig
from megatron_mup.config_io import config_from_dict, config_to_dict
from megatron_mup.data.publication import publish_text
from megatron_mup.revision import revision
from megatron_mup.transfer.campaign.fit import VERDICT_LEVEL, Fit
from megatron_mup.transfer.campaign.spec import Campaign, with_lr
from megatron_mup.transfer.campaign.target_data import shards_for
from megatron_mup.transfer.fits import Estimate, Minimum


@dataclass(frozen=True, kw_only=True)
class TargetFiles:
    """Where the target's files lie.

    Attributes:
        config: its configuration with the learning rate.
        prediction: the file for ``LR_FROM``.
    """

    config: Path
    prediction: Path

    @classmethod
    def below(cls, folder: Path) -> TargetFiles:
        """In a campaign's folder."""
        return cls(
            config=folder / "target" / "config.yaml",
            prediction=folder / "target" / "prediction.json",
        )

    def remove(self) -> bool:
        """Delete both, and their folder if nothing else is in it; returns whether there was one."""
        there = [path for path in (self.config, self.prediction) if path.exists()]
        for path in there:
            path.unlink()
        if there and not any(self.config.parent.iterdir()):
            self.config.parent.rmdir()
        return bool(there)


def write_target(
    files: TargetFiles,
    campaign: Campaign,
    *,
    proxy: RunConfig,
    record: Mapping[str, Any],
) -> None:
    """Write prediction and configuration, the latter last: where it is, both are of one fit.

    Args:
        files: where.
        campaign: whose gate let the prediction through.
        proxy: any run of the arm; its shards are the target's where the target names none.
        record: of ``prediction_record``.

    Raises:
        ConfigError: the target cannot be trained at this learning rate.
    """
    sections = with_lr(campaign.target_sections, record["lr"])
    sections.setdefault("data", {}).update(shards_for(campaign.target, proxy))
    config_from_dict(sections, origin=str(campaign.target_config))
    files.config.parent.mkdir(parents=True, exist_ok=True)
    header = "".join(f"# {line}\n" for line in _header(campaign, record))
    publish_text(files.prediction, json.dumps(record, indent=1) + "\n")
    publish_text(files.config, header + yaml.safe_dump(sections, sort_keys=False))


def prediction_record(
    campaign: Campaign, fit: Fit, *, table: Path, warnings: list[str]
) -> dict[str, Any]:
    """The prediction as plain data, in the form that ``launch begin --lr-from`` reads.

    Args:
        campaign: the campaign.
        fit: the prediction, with a value.
        table: of the proxies' runs.
        warnings: what is not corrected for.
    """
    prediction, target = fit.prediction, config_to_dict(campaign.target)
    assert prediction.value is not None
    return {
        "lr": 2.0 ** float(prediction.value),
        "log2_lr": float(prediction.value),
        "interval": {"level": campaign.gate.level, **_ends(prediction)},
        "parameterization": target["parameterization"],
        "optimizer": target["optimizer"]["optimizer"],
        "provenance": {
            "campaign": campaign.name,
            "arm": campaign.arm,
            "target_hidden_size": campaign.target.model.hidden_size,
            "proxies": [_optimum(one) for one in fit.minima],
            "runs": fit.runs,
            "table": str(table.absolute()),
            "verdict": fit.verdict.outcome,
            "because": fit.verdict.because,
            "not_corrected_for": warnings,
            "accepted": [kind.value for kind in campaign.gate.accept],
            "made_by": f"megatron-mup {revision()}",
        },
    }


def _optimum(one: Minimum) -> dict[str, float | None]:
    """Of a proxy, with its interval."""
    return {
        "hidden_size": one.size,
        "log2_lr": _plain(one.log2_lr.value),
        "level": VERDICT_LEVEL,
        **_ends(one.log2_lr),
    }


def _ends(estimate: Estimate) -> dict[str, float | None]:
    return {"log2_low": _plain(estimate.low), "log2_high": _plain(estimate.high)}


def _plain(value: float | None) -> float | None:
    """A number that YAML and JSON know, whatever library it comes from."""
    return None if value is None else float(value)


def _header(campaign: Campaign, record: Mapping[str, Any]) -> list[str]:
    """Comment lines: the prediction in words."""
    interval, origin = record["interval"], record["provenance"]
    widths = ", ".join(f"{proxy['hidden_size']:g}" for proxy in origin["proxies"])
    accepted = ", ".join(origin["accepted"])
    lines = [
        f"Target of the campaign {campaign.name}: {campaign.target_config} with optimizer.lr",
        f"predicted as 2^{record['log2_lr']:.3f} = {record['lr']:.6g}, {interval_words(interval)},",
        f"from {origin['runs']} runs of the arm {campaign.arm} at widths {widths}",
        f"in {origin['table']}.",
        f"Verdict: {origin['verdict']}: {origin['because']}",
        *(f"Not corrected for: {line}" for line in origin["not_corrected_for"]),
        *([f"Accepted by gate.accept: {accepted}."] if accepted else []),
        f"Made by {origin['made_by']}.",
    ]
    return lines


def interval_words(interval: dict[str, Any]) -> str:
    """``90% interval 2^-5.6 to 2^-5.1``; what is unknown is said."""
    low, high = interval["log2_low"], interval["log2_high"]
    if low is None or high is None:
        return "without an interval"
    return f"{100 * interval['level']:g}% interval 2^{low:.3f} to 2^{high:.3f}"


def launch_line(files: TargetFiles, campaign: Campaign) -> str:
    """How to start the target, from the folder in which the campaign was called."""
    if campaign.launch is None:
        ranks = campaign.target.parallel.model_parallel_size
        each = f"torchrun --nproc-per-node {ranks} -m megatron_mup" if ranks > 1 else "megatron-mup"
        return f"{each} train --config {shlex.quote(str(files.config))}"
    prediction, script = shlex.quote(str(files.prediction)), shlex.quote(str(campaign.launch))
    return f"LR_FROM={prediction} bash {script}"
