"""Stands in for check, sweep and report of a campaign, and calls its command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_mup.transfer.campaign.stages import CampaignRequest, Stage, run_campaign
from megatron_mup.transfer.runs import append_row, read_rows
from megatron_mup.transfer.sweep.cells import make_cells
from megatron_mup.transfer.sweep.pool import Share
from megatron_mup.transfer.sweep.session import RunRequest
from megatron_mup.transfer.sweep.spec import load_sweep
from tests.transfer.campaign.campaigns import (
    loss_with,
    rows_of,
)


class Acted:
    """Stands in for what takes time, and notes what ran."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.asked = 0
        self.loss: Callable[[float, float], float] = loss_with()
        self.noise = 0.003
        self.passes = True
        self.code = 0
        self.checked: list[dict[str, Any]] = []
        self.shards = "d" * 64
        self.target_error: Exception | None = None

    def check(self, inputs: dict[str, Any], _folder: Path, _echo: object) -> bool:
        self.calls.append("check")
        self.checked.append(inputs)
        return self.passes

    def sweep(self, request: RunRequest, _echo: object) -> int:
        """Add the rows that are missing, as the real one does."""
        self.asked += 1
        cells = make_cells(load_sweep(request.config), request.out / "data")
        table = request.out / "runs.csv"
        known = {row.cell for row in read_rows(table)}
        rows = [row for row in rows_of(cells, self.loss, noise=self.noise) if row.cell not in known]
        if rows or self.code:
            self.calls.append("sweep")
        if self.code == 0:
            request.out.mkdir(exist_ok=True)
            for row in rows:
                append_row(table, row)
        return self.code

    def target_data(self, *_arguments: object) -> None:
        if self.target_error is not None:
            raise self.target_error

    def report(self, _rows: object, folder: Path, **_options: object) -> None:
        self.calls.append("report")
        folder.mkdir(exist_ok=True)
        (folder / "report.html").touch()


def run(config: Path, until: Stage = Stage.TARGET, *text: Path) -> tuple[int, list[str]]:
    """Exit code and lines of the command."""
    lines: list[str] = []
    request = CampaignRequest(
        config=config,
        out=config.parent / "out",
        text=text,
        share=Share(workers=1, threads=1),
        until=until,
    )
    return run_campaign(request, lines.append), lines
