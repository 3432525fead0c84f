"""What runs again after a change, and what no longer holds is removed. No run is trained."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from megatron_mup.errors import DataError
from megatron_mup.transfer.campaign import checking, stages
from megatron_mup.transfer.campaign.stages import Stage
from megatron_mup.transfer.runs import append_row, read_rows
from megatron_mup.transfer.sweep.cells import make_cells, with_rate_and_seed
from megatron_mup.transfer.sweep.spec import load_sweep
from megatron_mup.transfer.sweep.text_source import note_text
from tests.transfer.campaign.acting import Acted, run
from tests.transfer.campaign.campaigns import (
    campaign_data,
    rows_of,
    target_data,
    write_campaign,
)


def test_the_table_is_compared_with_the_sweep_every_time(tmp_path: Path, acted: Acted) -> None:
    config, table = write_campaign(tmp_path), tmp_path / "out/sweep/runs.csv"
    run(config)
    rows = table.read_text().splitlines(keepends=True)
    # A run that the user wants to have again.
    table.write_text("".join(rows[:-1]))
    acted.calls.clear()
    assert run(config)[0] == 0
    assert (acted.calls, acted.asked) == (["sweep"], 2)
    assert table.read_text().count("\n") == len(rows)


def test_a_report_that_is_gone_is_made_again(tmp_path: Path, acted: Acted) -> None:
    config, report = write_campaign(tmp_path), tmp_path / "out/report/report.html"
    run(config)
    report.unlink()
    acted.calls.clear()
    code, lines = run(config)
    assert (code, acted.calls) == (0, ["report"])
    assert f"report: {report}" in lines
    assert report.exists()


@pytest.mark.parametrize("trouble", ["interrupted", "failed", "check", "gate", "target"])
def test_a_target_that_no_longer_holds_is_removed(
    tmp_path: Path, acted: Acted, trouble: str
) -> None:
    run(write_campaign(tmp_path))
    target = tmp_path / "out/target"
    changes: dict[str, Any] = {}
    config = target_data()
    if trouble == "interrupted":
        acted.code = 75
        changes["sweep"] = campaign_data()["sweep"] | {"seeds": [1, 2, 3, 4]}
    if trouble == "failed":
        # The YAML is the same, but rows are gone and their runs fail now.
        acted.code = 1
    if trouble == "check":
        acted.passes = False
        changes["coordinate_check"] = {"steps": 2}
    if trouble == "gate":
        changes["gate"] = {"widest_interval": 0.001}
    if trouble == "target":
        config = target_data(parameterization__name="sp")
    code, lines = run(write_campaign(tmp_path, config, **changes))
    assert code in (1, 75)
    assert f"the target in {target} held for what was before; removed" in lines
    assert not target.exists()
    assert not (tmp_path / "out/stages/target.json").exists()
    assert not (tmp_path / "out/stages/gate.json").exists()
    # What was before comes back.
    acted.code, acted.passes = 0, True
    assert run(write_campaign(tmp_path))[0] == 0
    assert (target / "config.yaml").exists()


@pytest.mark.parametrize("until", [Stage.COORDINATE_CHECK, Stage.FIT])
@pytest.mark.parametrize("changed", ["rule", "gate", "target"])
def test_a_target_that_answers_another_question_is_removed_however_short_the_command(
    tmp_path: Path, acted: Acted, changed: str, until: Stage
) -> None:
    run(write_campaign(tmp_path))
    changes: dict[str, Any] = {"gate": {"widest_interval": 0.001}} if changed == "gate" else {}
    options = {"rule": {"parameterization__name": "sp"}, "target": {"training__eval_iters": 7}}
    code, lines = run(
        write_campaign(tmp_path, target_data(**options.get(changed, {})), **changes), until
    )
    assert code == 0
    assert f"the target in {tmp_path}/out/target held for what was before; removed" in lines
    assert not (tmp_path / "out/target").exists()


def test_a_sweep_that_refuses_its_data_leaves_no_target(
    tmp_path: Path, acted: Acted, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_campaign(tmp_path)
    run(config)

    def refuse(*_arguments: object) -> int:
        raise DataError("on record with other shards")

    monkeypatch.setattr(stages, "run_sweep", refuse)
    with pytest.raises(DataError, match="other shards"):
        run(config)
    assert not (tmp_path / "out/target").exists()
    assert not (tmp_path / "out/stages/sweep.json").exists()


def test_a_text_that_was_left_out_or_mistaken_leaves_the_target(
    tmp_path: Path, acted: Acted
) -> None:
    sweep = campaign_data()["sweep"]
    sweep["base"] |= {"data": {}}
    config = write_campaign(tmp_path, sweep=sweep | {"text": {"vocab_size": 96}})
    text, other = tmp_path / "text.txt", tmp_path / "other.txt"
    text.write_text("one " * 100)
    other.write_text("two " * 100)
    assert run(config, Stage.TARGET, text)[0] == 0
    data = tmp_path / "out/sweep/data"
    data.mkdir()
    note_text(data, [text])
    (data / "text.manifest.json").touch()
    acted.calls.clear()
    assert run(config)[0] == 0
    for wrong, words in ((other, "other.txt is another text"), (tmp_path / "a", "there is no fil")):
        with pytest.raises(DataError, match=words):
            run(config, Stage.TARGET, wrong)
    assert acted.calls == []
    assert (tmp_path / "out/target/config.yaml").exists()
    assert (tmp_path / "out/stages/target.json").exists()


def test_a_pair_is_never_of_two_fits(
    tmp_path: Path, acted: Acted, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_campaign(tmp_path)
    run(config)
    # The record alone is gone, as after a power failure; then the disk is full.
    (tmp_path / "out/stages/target.json").unlink()

    def full(*_arguments: object, **_options: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(stages, "write_target", full)
    with pytest.raises(OSError, match="no space left"):
        run(config)
    assert not (tmp_path / "out/target").exists()


def test_runs_on_other_shards_enter_no_fit(tmp_path: Path, acted: Acted) -> None:
    config, table = write_campaign(tmp_path), tmp_path / "out/sweep/runs.csv"
    run(config)
    cells = make_cells(load_sweep(tmp_path / "out/sweep.yaml"), tmp_path / "out/sweep/data")
    # Of a rate that the YAML no longer holds, whose shards nobody compares.
    finer = with_rate_and_seed(cells[0], log2_lr=-6.5, seed=1)
    (row,) = rows_of([finer], lambda _width, _log2_lr: 0.1)
    append_row(table, replace(row, data_sha256="e" * 64))
    code, lines = run(config)
    assert code == 0, lines
    assert "1 runs on other shards are left out of the fit" in lines
    record = json.loads((tmp_path / "out/target/prediction.json").read_text())
    assert record["provenance"]["runs"] == 63


def test_a_target_whose_data_do_not_serve_is_refused_before_the_sweep(
    tmp_path: Path, acted: Acted
) -> None:
    acted.target_error = DataError("shard 'shards/train' is missing")
    config = write_campaign(tmp_path)
    with pytest.raises(DataError, match=r"shard 'shards/train' is missing"):
        run(config)
    assert acted.calls == []
    assert not (tmp_path / "out").exists()
    # Its proxies can be trained elsewhere.
    code, lines = run(config, Stage.SWEEP)
    assert (code, acted.calls) == (0, ["check", "sweep"])
    assert lines[0].startswith("warning: the target cannot be trained yet: shard ")


def test_other_losses_in_the_table_remove_the_target_before_the_gate(
    tmp_path: Path, acted: Acted
) -> None:
    config, table = write_campaign(tmp_path), tmp_path / "out/sweep/runs.csv"
    run(config)
    append_row(table, replace(read_rows(table)[0], validation_loss=3.0))
    assert run(config, Stage.FIT)[0] == 0
    assert acted.calls == ["check", "sweep", "report", "report"]
    assert not (tmp_path / "out/target/config.yaml").exists()


def test_the_name_of_a_campaign_is_in_its_report(tmp_path: Path, acted: Acted) -> None:
    run(write_campaign(tmp_path))
    acted.calls.clear()
    assert run(write_campaign(tmp_path, name="other"))[0] == 0
    assert acted.calls == ["report"]


@pytest.mark.parametrize("module", [checking, stages])
def test_another_version_of_the_package_checks_or_fits_again(
    tmp_path: Path, acted: Acted, monkeypatch: pytest.MonkeyPatch, module: ModuleType
) -> None:
    config = write_campaign(tmp_path)
    run(config)
    acted.calls.clear()
    if module is checking:
        monkeypatch.setattr(checking, "revision", lambda: "9.9.9")
    else:
        monkeypatch.setattr(stages, "__version__", "9.9.9")
    assert run(config)[0] == 0
    assert acted.calls == (["check", "report"] if module is checking else ["report"])


def test_the_level_of_the_interval_does_not_change_the_verdict(
    tmp_path: Path, acted: Acted
) -> None:
    # At this scatter 90% intervals of the shift reach beyond the threshold; 5% ones would not.
    acted.noise = 0.11
    code, lines = run(write_campaign(tmp_path, gate={"widest_interval": 50, "level": 0.05}))
    assert code == 1
    assert any("verdict: cannot tell" in line for line in lines)


def test_a_change_runs_again_what_depends_on_it(tmp_path: Path, acted: Acted) -> None:
    run(write_campaign(tmp_path))
    acted.calls.clear()
    # The gate's rules and the target touch no run.
    assert run(write_campaign(tmp_path, gate={"widest_interval": 0.9}))[0] == 0
    assert acted.calls == []
    wider = target_data(model__hidden_size=1024, model__num_attention_heads=64)
    assert run(write_campaign(tmp_path, wider))[0] == 0
    assert acted.calls == ["report"]
    record = json.loads((tmp_path / "out/target/prediction.json").read_text())
    assert record["provenance"]["target_hidden_size"] == 1024
    acted.calls.clear()
    assert run(write_campaign(tmp_path, coordinate_check={"steps": 2}))[0] == 0
    assert acted.calls == ["check", "report"]


def test_rates_that_are_added_run_but_the_check_does_not(tmp_path: Path, acted: Acted) -> None:
    path = write_campaign(tmp_path)
    run(path)
    acted.calls.clear()
    data = yaml.safe_load(path.read_text())
    data["sweep"]["learning_rate"] = {"log2": [-10, -9, -8, -7, -6, -5, -4, -3]}
    path.write_text(yaml.safe_dump(data))
    assert run(path)[0] == 0
    assert acted.calls == ["sweep", "report"]
