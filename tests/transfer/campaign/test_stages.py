"""The stages in order: what runs, what is on record, where it stops. No run is trained."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from megatron_mup.cli import app
from megatron_mup.errors import ConfigError
from megatron_mup.transfer.campaign import checking, stages
from megatron_mup.transfer.campaign.stages import CampaignRequest, Stage
from megatron_mup.transfer.runs import append_row
from megatron_mup.transfer.sweep.cells import make_cells
from megatron_mup.transfer.sweep.folder_lock import LOCK, held
from megatron_mup.transfer.sweep.spec import load_sweep
from tests.transfer.campaign.acting import Acted, run
from tests.transfer.campaign.campaigns import (
    loss_with,
    rows_of,
    target_data,
    write_campaign,
)


def test_a_campaign_goes_through_and_predicts(tmp_path: Path, acted: Acted) -> None:
    acted.loss = loss_with(at=-6.0, shift=-0.1)
    code, lines = run(write_campaign(tmp_path))
    assert code == 0, lines
    assert acted.calls == ["check", "sweep", "report"]
    record = json.loads((tmp_path / "out/target/prediction.json").read_text())
    # -6 at width 32, a tenth of an octave less each doubling, four doublings to 512.
    assert record["log2_lr"] == pytest.approx(-6.4, abs=0.1)
    assert record["interval"]["log2_low"] < -6.4 < record["interval"]["log2_high"]
    assert record["provenance"]["runs"] == 63
    sections = yaml.safe_load((tmp_path / "out/target/config.yaml").read_text())
    assert sections["optimizer"]["lr"] == record["lr"]
    assert lines[-1] == f"  megatron-mup train --config {tmp_path}/out/target/config.yaml"
    assert "gate: passed" in lines


def test_a_second_call_does_nothing_again_but_says_the_same(tmp_path: Path, acted: Acted) -> None:
    config = write_campaign(tmp_path)
    first = run(config)[1]
    before = (tmp_path / "out/target/config.yaml").stat().st_mtime_ns
    acted.calls.clear()
    code, second = run(config)
    assert (code, acted.calls) == (0, [])
    assert second[-3:] == first[-3:]
    assert (tmp_path / "out/target/config.yaml").stat().st_mtime_ns == before


def test_ctrl_c_in_any_stage_ends_with_the_code_of_a_stop(
    tmp_path: Path, acted: Acted, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_arguments: object) -> bool:
        raise KeyboardInterrupt

    config = write_campaign(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(checking, "check_arm", interrupt)
        code, lines = run(config)
    assert (code, lines[-1]) == (75, "interrupted; the same command goes on from here")
    assert run(config)[0] == 0
    assert acted.calls == ["check", "sweep", "report"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_batch_systems_signal_outside_the_sweep_is_a_request_to_stop(
    tmp_path: Path, acted: Acted, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    def told(*_arguments: object, **_options: object) -> None:
        signal.raise_signal(number)

    before = signal.signal(number, signal.SIG_IGN)
    try:
        monkeypatch.setattr("megatron_mup.transfer.report.build.make_report", told)
        code, lines = run(write_campaign(tmp_path))
        assert (code, lines[-1]) == (75, "interrupted; the same command goes on from here")
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_a_second_campaign_in_a_folder_is_refused(tmp_path: Path, acted: Acted) -> None:
    config, out = write_campaign(tmp_path), tmp_path / "out"
    with (
        held(out, LOCK, by="campaign"),
        pytest.raises(ConfigError, match=rf"{out} is in use by another campaign \(pid \d+ on "),
    ):
        run(config)
    assert (acted.calls, acted.asked) == ([], 0)


def test_a_failed_check_stops_before_the_sweep(tmp_path: Path, acted: Acted) -> None:
    acted.passes = False
    config = write_campaign(tmp_path)
    for _ in range(2):
        code, lines = run(config)
        assert code == 1
        assert "the coordinate check of arm mup failed" in lines[-1]
    # It is not on record as through.
    assert acted.calls == ["check", "check"]


def test_the_check_is_of_the_arm_at_the_proxies_widths(tmp_path: Path, acted: Acted) -> None:
    options = {"seeds": 2, "options": {"lr": 0.5, "model.num_layers": 1}}
    run(write_campaign(tmp_path, coordinate_check=options), Stage.COORDINATE_CHECK)
    (inputs,) = acted.checked
    assert (inputs["widths"], inputs["steps"], inputs["seeds"]) == ([32, 64, 128], 4, 2)
    assert inputs["config"]["parameterization"]["name"] == "mup"
    assert inputs["options"] == {
        "model.seq_length": 32,
        "training.global_batch_size": 4,
        "training.micro_batch_size": 2,
        "optimizer.lr": 0.5,
        "model.num_layers": 1,
    }
    assert acted.calls == ["check"]


@pytest.mark.parametrize("code", [1, 75])
def test_a_sweep_that_is_not_through_ends_the_command(
    tmp_path: Path, acted: Acted, code: int
) -> None:
    acted.code = code
    config = write_campaign(tmp_path)
    assert run(config)[0] == code
    acted.code = 0
    assert run(config)[0] == 0
    assert acted.calls == ["check", "sweep", "sweep", "report"]


def test_an_optimum_beyond_the_grid_stops_and_says_what_to_do(tmp_path: Path, acted: Acted) -> None:
    acted.loss = loss_with(at=-2.0)
    code, lines = run(write_campaign(tmp_path))
    assert code == 1
    assert "the gate stops the campaign, and no target was written:" in lines
    assert any("widths 32, 64, 128: the lowest loss lies at the high end" in line for line in lines)
    assert any("next: add learning rates above it" in line for line in lines)
    assert lines[-1].endswith("run the same command: only new runs are trained")
    assert not (tmp_path / "out/target").exists()


def test_an_optimum_that_moves_stops(tmp_path: Path, acted: Acted) -> None:
    acted.loss = loss_with(at=-5.0, shift=-1.0)
    code, lines = run(write_campaign(tmp_path))
    assert code == 1
    assert any("verdict: does not transfer" in line for line in lines)


def test_a_noisy_sweep_stops_until_it_is_accepted(tmp_path: Path, acted: Acted) -> None:
    acted.noise = 0.11
    loose = {"widest_interval": 50}
    code, lines = run(write_campaign(tmp_path, gate=loose))
    assert code == 1
    assert any("verdict: cannot tell" in line for line in lines)
    acted.calls.clear()
    code, lines = run(write_campaign(tmp_path, gate=loose | {"accept_cannot_tell": True}))
    assert (code, acted.calls) == (0, []), lines
    assert "cannot tell" in (tmp_path / "out/target/config.yaml").read_text()


def test_what_is_known_before_is_told_before_anything_runs(tmp_path: Path, acted: Acted) -> None:
    config = write_campaign(tmp_path, target_data(parameterization__name="sp"))
    code, lines = run(config)
    assert (code, acted.calls) == (1, [])
    assert not (tmp_path / "out").exists()
    assert lines[0] == "the gate stops the campaign, and nothing was run:"
    assert "parameterization.name mup -> sp" in lines[1]
    # Proxies alone may be wanted.
    code, lines = run(config, Stage.FIT)
    assert (code, acted.calls) == (0, ["check", "sweep", "report"])
    assert lines[0].startswith("the gate will stop: the target differs")


def test_until_names_the_last_stage(tmp_path: Path, acted: Acted) -> None:
    config = write_campaign(tmp_path)
    for until, calls in [
        (Stage.COORDINATE_CHECK, ["check"]),
        (Stage.SWEEP, ["sweep"]),
        (Stage.GATE, ["report"]),
    ]:
        acted.calls.clear()
        assert run(config, until)[0] == 0
        assert acted.calls == calls
        assert not (tmp_path / "out/target").exists()


def test_rows_of_other_arms_and_of_an_earlier_yaml_enter_no_fit(
    tmp_path: Path, acted: Acted
) -> None:
    config = write_campaign(tmp_path)
    run(config, Stage.SWEEP)
    out = tmp_path / "out"
    cells = make_cells(load_sweep(out / "sweep.yaml"), out / "sweep/data")
    strange = rows_of(cells[:1], loss_with())[0]
    append_row(out / "sweep/runs.csv", replace(strange, cell="0" * 12, validation_loss=0.1))
    for number, row in enumerate(rows_of(cells, loss_with(at=-4.0))):
        append_row(out / "sweep/runs.csv", replace(row, arm="sp", cell=f"{number:012d}"))
    assert run(config)[0] == 0
    record = json.loads((out / "target/prediction.json").read_text())
    assert record["provenance"]["runs"] == 63
    assert record["log2_lr"] == pytest.approx(-6.0, abs=0.1)


def test_the_command_passes_its_options_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[CampaignRequest] = []

    def fake(request: CampaignRequest, _echo: object) -> int:
        requests.append(request)
        return 75

    monkeypatch.setattr(stages, "run_campaign", fake)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    words = ["campaign", "c.yaml", "--out", str(tmp_path), "--text", "a", "--workers", "3"]
    assert CliRunner().invoke(app, [*words, "--until", "gate"]).exit_code == 75
    (request,) = requests
    assert (request.config, request.out, request.text) == (Path("c.yaml"), tmp_path, (Path("a"),))
    assert (request.share.workers, request.until) == (3, Stage.GATE)
    done = CliRunner().invoke(app, [*words, "--until", "gates"])
    assert isinstance(done.exception, ConfigError)
    assert "--until is 'gates'; use one of coordinate_check, sweep" in str(done.exception)
