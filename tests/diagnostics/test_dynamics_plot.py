"""``megatron-mup plot``: table, picture, refusals, and the option that makes a run measure."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from matplotlib.colors import same_color

from megatron_mup import cli
from megatron_mup.config import RunConfig
from megatron_mup.diagnostics.dynamics import UpdateDynamics
from megatron_mup.diagnostics.dynamics_plot import plot
from megatron_mup.errors import ConfigError, DataError
from megatron_mup.training import loop
from megatron_mup.training.outcome import TrainResult
from tests.configurations import tiny

ROWS = [
    {
        "iteration": 10 * step,
        "relative-update/query/layer0": 0.02 / step,
        "relative-update/query/layer1": 0.04 / step,
        "update-alignment/query/layer0": 0.5,
        "weight-alignment/query/layer0": 0.125,
        "relative-representation-change/query/layer0": 0.08 / step,
        "alignment-ratio/query/layer0": 4.0,
        "alignment-ratio/query/layer1": None,
        "weight-norm/query/layer0": 3.0,
        "weight-norm/query/layer1": 5.0,
        "effective-decay/query/layer0": 0.0004,
        "effective-decay/query/layer1": 0.0004,
        "relative-update/gain/final": 0.001,
        "weight-norm/gain/final": 8.0,
        "effective-decay/gain/final": 0.0,
    }
    for step in (1, 2)
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run folder with two measured iterations."""
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / "dynamics.jsonl").write_text(lines)
    return tmp_path


def test_table_shows_the_last_means_of_each_role(folder: Path) -> None:
    lines = plot(folder).splitlines()

    assert lines[0] == "Means over the tensors of each role at iteration 20:"
    assert lines[4:6] == [
        # sqrt(0.0004) = 0.02; alignments that a gain does not have are dashes.
        "| query | 2 | 0.015 | 0.02 | 0.5 | 0.125 | 4 | 0.04 | 4 | 0.0004 |",
        "| gain | 1 | 0.001 | - | - | - | - | - | 8 | 0 |",
    ]
    assert lines[-1] == f"picture: {folder / 'dynamics.png'}"
    assert (folder / "dynamics.png").read_bytes().startswith(b"\x89PNG")


def test_picture_has_a_curve_a_role_and_the_equilibrium_where_there_is_decay(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    monkeypatch.setattr(plt, "close", drawn.append)
    plot(folder / "dynamics.jsonl", folder / "out.svg")

    assert (folder / "out.svg").read_bytes().startswith(b"<?xml")
    panels = {axis.get_title().split("\n")[0]: axis for axis in drawn[0].axes if axis.get_title()}
    assert list(panels) == [
        "relative update |dW| / |W|",
        "update alignment",
        "weight alignment",
        "alignment ratio",
        "relative representation change",
        "weight norm |W|",
        "effective decay",
    ]
    update, *alignments, change, norms, decay = (axis.get_lines() for axis in panels.values())
    curves = {line.get_label(): line.get_ydata() for line in update}
    assert curves["query"] == pytest.approx([0.03, 0.015])
    assert curves["gain"] == pytest.approx([0.001, 0.001])
    (balance,) = [line for line in update if line.get_linestyle() == "--"]
    assert balance.get_xdata() == pytest.approx([10, 20])
    assert balance.get_ydata() == pytest.approx([0.02, 0.02])
    # Gains have no product with a hidden vector.
    assert [[line.get_label() for line in lines] for lines in alignments] == [["query"]] * 3
    assert [list(line.get_ydata()) for lines in alignments for line in lines] == [
        [0.5, 0.5],
        [0.125, 0.125],
        [4.0, 4.0],
    ]
    (moved,) = change
    assert moved.get_ydata() == pytest.approx([0.08, 0.04])
    assert [line.get_label() for line in norms] == ["query", "gain"]
    # A decay of zero has no place on the logarithmic axis.
    assert [line.get_label() for line in decay] == ["query"]
    assert {axis.get_yscale() for axis in panels.values()} == {"log"}


def test_the_tensors_of_a_role_are_thin_lines_of_its_color_inside_the_panel(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    monkeypatch.setattr(plt, "close", drawn.append)
    # Another role first, so that the color of the queries is not Matplotlib's own first one.
    rows = [{"iteration": row["iteration"], "weight-norm/embedding/table": 1.0} for row in ROWS]
    lines = [json.dumps(first | row) + "\n" for first, row in zip(rows, ROWS, strict=True)]
    (folder / "dynamics.jsonl").write_text("".join(lines))
    plot(folder)

    norms = next(axis for axis in drawn[0].axes if axis.get_title().startswith("weight norm"))
    mean = next(line for line in norms.get_lines() if line.get_label() == "query")
    # Gains have one tensor, which is its own mean.
    (tensors,) = norms.collections
    assert [segment.tolist() for segment in tensors.get_segments()] == [
        [[10, 3.0], [20, 3.0]],
        [[10, 5.0], [20, 5.0]],
    ]
    assert same_color(tensors.get_edgecolor()[0][:3], mean.get_color()[:3])
    assert tensors.get_linewidth()[0] < mean.get_linewidth()
    low, high = norms.get_ylim()
    assert low < 3.0
    assert high > 8.0


def test_a_run_without_decay_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(plt, "close", drawn.append)
    row = {key: 0.0 if "decay" in key else value for key, value in ROWS[0].items()}
    (folder / "dynamics.jsonl").write_text(json.dumps({**row, "iteration": 5}) + "\n")
    plot(folder)

    texts = {axis.get_title(): [text.get_text() for text in axis.texts] for axis in drawn[0].axes}
    assert texts["effective decay\nLR x weight decay, per step"] == ["zero everywhere"]
    assert len(drawn[0].axes[0].get_lines()) == 2


def test_quantities_that_were_not_measured_say_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    monkeypatch.setattr(plt, "close", drawn.append)
    row = {"iteration": 5, "weight-norm/gain/final": 8.0}
    (folder / "dynamics.jsonl").write_text(json.dumps(row) + "\n")
    plot(folder)

    shown = [[text.get_text() for text in axis.texts] for axis in drawn[0].axes if axis.get_title()]
    assert shown == [["not measured"]] * 5 + [[], ["not measured"]]


def test_an_unknown_format_or_an_unwritable_place_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"must end in \.png, \.pdf, \.svg"):
        plot(folder, folder / "picture.gif")
    with pytest.raises(DataError, match="--out"):
        plot(folder, folder / "dynamics.jsonl" / "picture.png")


def test_the_command_line_plots_and_sets_the_interval(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["megatron-mup", "plot", str(folder)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert not stopped.value.code
    assert "| query | 2 | 0.015 |" in capsys.readouterr().out

    runs: list[RunConfig] = []
    monkeypatch.setattr(cli, "_train", runs.append)
    source = ["--preset", "baseline", "--width", "64", "--head-dim", "16", "lr=0.01"]
    arguments = ["train", *source, "--diagnostics-interval", "25"]
    monkeypatch.setattr(sys, "argv", ["megatron-mup", *arguments])
    with pytest.raises(SystemExit):
        cli.main()
    assert runs[0].logging.diagnostics_interval == 25


def test_the_command_line_brings_the_observer(monkeypatch: pytest.MonkeyPatch) -> None:
    observers: list[object] = []

    def training(_run: RunConfig, *, observer: object, **_others: object) -> TrainResult:
        observers.append(observer)
        return TrainResult(iteration=0, saves=False)

    monkeypatch.setattr(loop, "train", training)
    cli._train(tiny())
    cli._train(tiny("diagnostics_interval=2", "diagnostics_path=unused.jsonl"))
    assert observers[0] is None
    assert isinstance(observers[1], UpdateDynamics)
