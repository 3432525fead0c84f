"""One ``megatron-mup campaign``: coordinate check, proxy sweep, fit, gate, target.

Each stage that is through is on record and runs again only if what it depends on has changed; the
sweep and the coordinate check are run by their own packages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_mup import __version__, exit_codes
from megatron_mup.config import RunConfig
from megatron_mup.config_io import config_to_dict
from megatron_mup.data.publication import publish_text
from megatron_mup.errors import DataError, MupError
from megatron_mup.transfer.campaign.fit import (
    VERDICT_LEVEL,
    Fit,
    fit_proxies,
    on_shards,
)
from megatron_mup.transfer.campaign.gate import Stop, stops_after_fit, stops_before_runs
from megatron_mup.transfer.campaign.interruption import as_ctrl_c
from megatron_mup.transfer.campaign.likeness import warnings
from megatron_mup.transfer.campaign.records import Records, digest
from megatron_mup.transfer.campaign.spec import Campaign, load_campaign
from megatron_mup.transfer.campaign.stage import Stage
from megatron_mup.transfer.campaign.target import (
    TargetFiles,
    interval_words,
    launch_line,
    prediction_record,
    write_target,
)
from megatron_mup.transfer.campaign.target_data import check_target_data
from megatron_mup.transfer.runs import Row
from megatron_mup.transfer.sweep.base import portable_document
from megatron_mup.transfer.sweep.data_checks import check_source, check_text_options
from megatron_mup.transfer.sweep.folder import SweepFolder
from megatron_mup.transfer.sweep.folder_lock import LOCK, held
from megatron_mup.transfer.sweep.own_rows import own_rows
from megatron_mup.transfer.sweep.pool import Share
from megatron_mup.transfer.sweep.remarks import base_remarks
from megatron_mup.transfer.sweep.results import data_digest
from megatron_mup.transfer.sweep.session import RunRequest, run_sweep

Print = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class CampaignRequest:
    """What the command line says.

    Attributes:
        config: the campaign's YAML.
        out: the campaign's folder.
        text: files for tokenizer and shards; empty: the folder's own shards, or installed Python
            sources where it has none.
        share: processes of the sweep.
        until: last stage to run.
    """

    config: Path
    out: Path
    text: tuple[Path, ...]
    share: Share
    until: Stage = Stage.TARGET


def run_campaign(request: CampaignRequest, echo: Print) -> int:
    """Run the stages that are not through.

    Args:
        request: what to run and where.
        echo: receives lines.

    Returns:
        The process's exit code: 0, 1 where a stage says stop, 75 after a request to stop.

    Raises:
        MupError: before anything runs, if the YAML, a configuration or the data do not fit.
    """
    runner = _Runner(request, load_campaign(request.config), echo)
    try:
        with as_ctrl_c():
            return _refuse_or_run(runner, request)
    except KeyboardInterrupt:
        # Stages are on record when they are through; the sweep hears requests itself.
        echo("interrupted; the same command goes on from here")
        return exit_codes.STOPPED_SAVED


def _refuse_or_run(runner: _Runner, request: CampaignRequest) -> int:
    """Hold the folder, refuse what cannot work, run the stages."""
    is_new = not request.out.exists()
    # There is nothing in a new folder to hold, and what is refused is not to leave one behind.
    if is_new and (code := runner.refuse_early()):
        return code
    with held(request.out, LOCK, by="campaign"):
        code = exit_codes.FINISHED if is_new else runner.refuse_early()
        return code or _run_stages(runner, request.until)


def _run_stages(runner: _Runner, until: Stage) -> int:
    """One after the other, as long as none says stop; the folder is held."""
    stages = [
        (Stage.COORDINATE_CHECK, runner.check),
        (Stage.SWEEP, runner.sweep),
        (Stage.FIT, runner.fit),
        (Stage.GATE, runner.gate),
        (Stage.TARGET, runner.target),
    ]
    runner.prepare()
    for stage, step in stages:
        code = step()
        if code or stage is until:
            return code
    return exit_codes.FINISHED


class _Runner:
    """The command's own variables: cells, and what the last stage found."""

    def __init__(self, request: CampaignRequest, campaign: Campaign, echo: Print) -> None:
        self._request, self._campaign, self._echo = request, campaign, echo
        self._records = Records(request.out / "stages")
        self._folder = SweepFolder(request.out / "sweep")
        self._cells = campaign.proxies(self._folder.data)
        self._rows: list[Row] = []
        self._fit: Fit | None = None
        self._inputs_of_gate: Any = None

    @property
    def _widths(self) -> list[float]:
        return list(self._campaign.sweep.sizes)

    @property
    def _largest(self) -> RunConfig:
        """The arm at its largest width."""
        return max(self._cells, key=lambda cell: cell.size).run

    def refuse_early(self) -> int:
        """Refuse what is known to fail before anything runs; returns the exit code."""
        request = self._request
        check_text_options(self._campaign.sweep, self._cells, request.text)
        check_source(self._campaign.sweep, self._cells, self._folder, request.text)
        for line in base_remarks(self._campaign.sweep):
            self._echo(line)
        if self._records.result(Stage.GATE).get("asked_sha256") != digest(self._asked):
            # Another target or gate, or none that is through: files answer other questions.
            self._forget_after(Stage.FIT)
        stops = self._early_stops()
        last = request.until in (Stage.GATE, Stage.TARGET)
        if stops:
            self._forget_after(Stage.FIT)
        if stops and last:
            return self._stopped(stops, "nothing was run")
        for stop in stops:
            self._echo(f"the gate will stop: {stop.why}")
        try:
            check_target_data(self._campaign.target, self._largest, self._campaign.sweep.text)
        except MupError as error:
            if last:
                raise
            self._echo(f"warning: the target cannot be trained yet: {error}")
        return exit_codes.FINISHED

    @property
    def _asked(self) -> dict[str, Any]:
        """What a target's files answer, beside the runs."""
        campaign = self._campaign
        return {"rules": asdict(campaign.gate), "target": config_to_dict(campaign.target)}

    def prepare(self) -> None:
        """Write the sweep of the arm, as this command and the tasks of an array read it."""
        document = yaml.safe_dump(portable_document(self._campaign.sweep), sort_keys=False)
        publish_text(self._sweep_yaml, document)

    @property
    def _sweep_yaml(self) -> Path:
        return self._request.out / "sweep.yaml"

    def _early_stops(self) -> list[Stop]:
        return stops_before_runs(
            self._largest,
            self._campaign.target,
            widths=self._widths,
            rules=self._campaign.gate,
            budget=self._campaign.sweep.tokens,
        )

    def _warnings(self) -> list[str]:
        campaign = self._campaign
        return warnings(self._largest, campaign.target, budget=campaign.sweep.tokens)

    def check(self) -> int:
        """The coordinate check of the arm, at the proxies' widths."""
        from megatron_mup.transfer.campaign.checking import check_arm, check_inputs

        first = min(self._cells, key=lambda cell: cell.size).run
        folder = self._request.out / Stage.COORDINATE_CHECK
        inputs = check_inputs(first, self._campaign.check, self._widths)
        if self._records.is_done(Stage.COORDINATE_CHECK, inputs):
            self._echo(f"coordinate check: passed before; {folder}")
            return 0
        self._forget_after(Stage.COORDINATE_CHECK)
        if not check_arm(inputs, folder, self._echo):
            self._echo(
                f"the campaign stops: the coordinate check of arm {self._campaign.arm} failed; the "
                "modules named above move with the width, so that no learning rate will transfer. "
                "Mend the arm's parameterization, or, if the widths are too few or too small to "
                "tell, set coordinate_check.widths"
            )
            return exit_codes.INCOMPLETE
        self._records.write(Stage.COORDINATE_CHECK, inputs, {"passed": True, "folder": str(folder)})
        return 0

    def sweep(self) -> int:
        """The arm's runs."""
        campaign, request = self._campaign, self._request
        inputs = {"sweep": portable_document(campaign.sweep)}
        if not self._records.is_done(Stage.SWEEP, inputs):
            self._forget_after(Stage.SWEEP)
        # Always: the table, the text and the shards may be others, and what is there takes no time.
        sweep = RunRequest(
            config=self._sweep_yaml,
            out=self._folder.path,
            text=request.text,
            share=request.share,
        )
        try:
            code = run_sweep(sweep, self._echo)
        except DataError:
            self._forget_sweep()
            raise
        if code == exit_codes.FINISHED:
            self._records.write(Stage.SWEEP, inputs, {"table": str(self._folder.table)})
            return code
        self._forget_sweep()
        if code != exit_codes.STOPPED_SAVED:
            self._echo("the campaign stops: runs failed; the same command tries them again")
        return code

    def _forget_sweep(self) -> None:
        """Runs are missing or are of other data: what was made from all of them no longer holds."""
        self._records.drop(Stage.SWEEP)
        self._forget_after(Stage.SWEEP)

    def _read_rows(self) -> list[Row]:
        """The arm's runs on the present shards."""
        rows = own_rows(self._folder.rows(), self._cells)
        kept = on_shards(rows, data_digest(self._largest))
        if len(kept) < len(rows):
            self._echo(f"{len(rows) - len(kept)} runs on other shards are left out of the fit")
        return kept

    def fit(self) -> int:
        """Minima, verdict and prediction; a report is written where the runs have changed."""
        campaign, out = self._campaign, self._request.out
        self._rows = self._read_rows()
        width, level = campaign.target.model.hidden_size, campaign.gate.level
        inputs = {
            "rows": _rows_digest(self._rows),
            "level": level,
            "width": width,
            "widths": self._widths,
            "title": [campaign.name, str(self._folder.table)],
            "version": __version__,
        }
        self._inputs_of_gate = inputs
        report = out / "report" / "report.html"
        is_done = report.exists() and self._records.is_done(Stage.FIT, inputs)
        if not is_done:
            self._forget_after(Stage.FIT)
        self._fit = fit_proxies(self._rows, width, widths=self._widths, level=level)
        verdict = self._fit.verdict
        if not is_done:
            self._report()
            prediction = self._fit.prediction
            self._records.write(
                Stage.FIT,
                inputs,
                {
                    "verdict": verdict.outcome,
                    "because": verdict.because,
                    "log2_lr": prediction.value,
                },
            )
        for one in self._fit.minima:
            value = one.log2_lr.value
            best = f"2^{value:.2f}" if value is not None else f"unknown ({one.log2_lr.reason})"
            self._echo(f"fit: width {one.size:g}: best learning rate {best}")
        self._echo(f"fit: {verdict.outcome}: {verdict.because}")
        self._echo(f"report: {report}")
        return 0

    def _report(self) -> None:
        # Draws figures, whose library takes a second to import.
        from megatron_mup.transfer.report.build import make_report
        from megatron_mup.transfer.report.source import Reported

        make_report(
            Reported(rows=tuple(self._rows), table=str(self._folder.table)),
            self._request.out / "report",
            title=f"Learning-rate transfer: {self._campaign.name}",
            level=VERDICT_LEVEL,
        )

    def gate(self) -> int:
        """Whether the prediction may be used."""
        fit, rules = self._known_fit(), self._campaign.gate
        for line in self._warnings():
            self._echo(f"warning: {line}")
        stops = stops_after_fit(fit, rules)
        if stops:
            self._forget_after(Stage.FIT)
            code = self._stopped(stops, "no target was written")
            self._echo(
                "change the campaign's YAML and run the same command: only new runs are trained"
            )
            return code
        inputs = {**self._inputs_of_gate, "rules": asdict(rules)}
        result = {"passed": True, "asked_sha256": digest(self._asked)}
        self._records.write(Stage.GATE, inputs, result)
        self._echo("gate: passed")
        return 0

    def _stopped(self, stops: Sequence[Stop], consequence: str) -> int:
        self._echo(f"the gate stops the campaign, and {consequence}:")
        for stop in stops:
            self._echo(f"  - {stop.why}")
            self._echo(f"    next: {stop.next_step}")
        return exit_codes.INCOMPLETE

    def target(self) -> int:
        """Configuration and prediction of the target, and how to start it."""
        campaign, fit = self._campaign, self._known_fit()
        files = self._files
        table = self._folder.table
        record = prediction_record(campaign, fit, table=table, warnings=self._warnings())
        inputs = {"record": record, "target": config_to_dict(campaign.target)}
        written = files.config.exists() and files.prediction.exists()
        if not (written and self._records.is_done(Stage.TARGET, inputs)):
            # Never one file of this fit beside one of the last, whenever the power fails.
            self._records.drop(Stage.TARGET)
            files.remove()
            write_target(files, campaign, proxy=self._largest, record=record)
            self._records.write(Stage.TARGET, inputs, {"config": str(files.config)})
        self._echo(
            f"target: optimizer.lr {record['lr']:.6g} (2^{record['log2_lr']:.3f}, "
            f"{interval_words(record['interval'])}) in {files.config}"
        )
        self._echo("start it with:")
        self._echo(f"  {launch_line(files, campaign)}")
        return 0

    def _forget_after(self, stage: Stage) -> None:
        """Drop what later stages have found: a target of theirs would look as if it still held."""
        order = list(Stage)
        for later in order[order.index(stage) + 1 :]:
            self._records.drop(later)
        if self._files.remove():
            self._echo(
                f"the target in {self._files.config.parent} held for what was before; removed"
            )

    @property
    def _files(self) -> TargetFiles:
        return TargetFiles.below(self._request.out)

    def _known_fit(self) -> Fit:
        assert self._fit is not None
        return self._fit


def _rows_digest(rows: Sequence[Row]) -> str:
    """Of what the fits read."""
    values = sorted(
        [row.cell, row.size, row.log2_lr, row.seed, row.status.value, repr(row.validation_loss)]
        for row in rows
    )
    return digest(values)
