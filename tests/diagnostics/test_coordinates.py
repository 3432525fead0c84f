"""The coordinate check trains: muP passes, SP fails, broken hooks fail, divergence is a verdict."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_mup import cli
from megatron_mup.diagnostics import coordinate_check, coordinates
from megatron_mup.diagnostics.coordinate_check import CheckRequest, run_check
from megatron_mup.diagnostics.coordinate_fit import Fit, Verdict, failures, fit_coordinates
from megatron_mup.diagnostics.coordinate_picture import draw
from megatron_mup.diagnostics.coordinates import CheckPlan, Coordinate, measure
from megatron_mup.diagnostics.recorder import attention_scores, recorded_modules
from megatron_mup.diagnostics.widths import Grow, runs_at_widths
from megatron_mup.errors import ConfigError, DataError
from megatron_mup.model import gpt
from megatron_mup.run_source import RunSource
from megatron_mup.training.processes import Launch
from megatron_mup.training.state import TrainState, build_state
from tests.configurations import tiny

WIDTHS = (32, 64, 128)
HIDDEN = {
    *(f"layer {number} {kind}" for number in (1, 2) for kind in ("attention_out", "ffn_out")),
    *(f"layer {number} residual" for number in (1, 2)),
    "final_norm",
}


def silent(_line: str) -> None:
    """Tests read the numbers."""


def check(
    *overrides: str,
    preset: str = "baseline",
    steps: int = 2,
    seeds: int = 2,
    grow: Grow = Grow.HEADS,
) -> tuple[dict[tuple[str, int], Fit], list[Coordinate]]:
    """Fits by module and step, and the measured numbers, at three small widths."""
    first = WIDTHS[0]
    source = RunSource(preset=preset, width=first, head_dim=16, base_width=first)
    runs = runs_at_widths(source, overrides, WIDTHS, grow=grow)
    plan = CheckPlan(runs=runs, steps=steps, seeds=seeds)
    found = measure(plan, Launch(), echo=silent)
    fits = fit_coordinates(found, runs[WIDTHS[-1]], grow=grow)
    return {(fit.module, fit.step): fit for fit in fits}, found


def wrong(fits: dict[tuple[str, int], Fit]) -> dict[str, str]:
    """Failing module -> verdict."""
    return {module: fit.verdict.value for module, fit in failures(list(fits.values())).items()}


def test_mup_passes_and_its_logits_start_as_the_inverse_root_of_the_width() -> None:
    fits, found = check(steps=3)
    assert wrong(fits) == {}
    assert fits["logits", 0].slope == pytest.approx(-0.5, abs=0.1)
    assert fits["layer 2 residual", 3].slope == pytest.approx(0.0, abs=0.15)
    # 3 widths, 2 seeds, steps 0 to 3; embedding, 2 x 4 in layers, final norm, logits.
    assert len(found) == 3 * 2 * 4 * 11
    assert {row.change for row in found if row.step == 0} == {0.0}


def test_embedding_and_final_norm_have_the_sizes_that_the_table_gives_them() -> None:
    _, found = check(steps=1, seeds=1)
    sizes = {(row.module, row.step): row for row in found if row.width == 128}
    assert sizes["embedding", 0].rms == pytest.approx(1.0, abs=0.02)
    assert sizes["final_norm", 0].rms == pytest.approx(1.0, abs=1e-3)
    # Scores q.k / D of unit normed inputs: D^1/2 / D.
    assert sizes["layer 1 scores", 0].rms == pytest.approx(0.25, abs=0.02)
    # AdamW's first step moves every element it touches by the learning rate.
    assert sizes["embedding", 1].change == pytest.approx(2**-10, rel=1e-3)


def test_sp_fails_with_every_hidden_activation_and_the_logits_growing() -> None:
    fits, _ = check(preset="sp_simple", steps=1)
    failed = wrong(fits)
    assert HIDDEN | {"layer 1 scores", "layer 2 scores", "logits"} == set(failed)
    assert set(failed.values()) == {"grows"}
    assert fits["layer 2 residual", 1].slope > 0.7


def test_a_hidden_learning_rate_wrong_by_half_a_power_fails() -> None:
    fits, _ = check("hidden_lr_exponent=-0.5", steps=1)
    assert set(wrong(fits)) >= HIDDEN


def test_a_hidden_learning_rate_that_falls_too_fast_fails() -> None:
    fits, _ = check("hidden_lr_exponent=-2", steps=1, seeds=1)
    assert {module: wrong(fits)[module] for module in HIDDEN} == dict.fromkeys(HIDDEN, "shrinks")


def test_a_dropped_readout_multiplier_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpt, "register_multipliers", lambda *_: None)
    fits, _ = check("output_form=multiplier", steps=1, seeds=1)
    assert wrong(fits)["logits"] == "grows"
    assert fits["logits", 0].slope == pytest.approx(0.5, abs=0.1)


def test_a_standard_attention_scale_fails_when_the_head_dim_grows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, _ = check(grow=Grow.HEAD_DIM, steps=1)
    assert wrong(whole) == {}
    assert whole["layer 1 scores", 0].slope == pytest.approx(-0.5, abs=0.1)

    def with_standard_scale(run: Any) -> TrainState:
        state = build_state(run)
        for name, module in state.model_chunks[0].named_modules():
            if name.endswith("core_attention"):
                module.softmax_scale = run.model.head_dim**-0.5
        return state

    monkeypatch.setattr(coordinates, "build_state", with_standard_scale)
    fits, _ = check(grow=Grow.HEAD_DIM, steps=1, seeds=1)
    assert wrong(fits) == {"layer 1 scores": "grows", "layer 2 scores": "grows"}
    assert fits["layer 1 scores", 0].slope == pytest.approx(0.0, abs=0.1)


def test_zero_queries_readout_and_branches_are_zero_first_and_move_later() -> None:
    fits, _ = check("q_init=zero", "u_init=zero")
    assert wrong(fits) == {}
    zero = {key for key, fit in fits.items() if fit.verdict is Verdict.ZERO}
    at_start = {("layer 1 scores", 0), ("layer 2 scores", 0), ("logits", 0)}
    assert {key for key in zero if key[1] == 0} == at_start
    # No gradient passes a zero readout in the first step.
    modules = {module for module, _ in fits}
    assert {module for module, step in zero if step == 1} == modules - {"logits"}
    assert not {module for module, step in zero if step == 2}


def test_a_run_that_does_not_learn_fails() -> None:
    fits, _ = check("lr=0", steps=1, seeds=1)
    assert set(wrong(fits).values()) == {"does not move"}


def test_a_diverged_run_is_a_verdict() -> None:
    fits, _ = check("lr=1e30", steps=2, seeds=1)
    assert fits["logits", 2].verdict is Verdict.DIVERGED
    assert fits["logits", 0].verdict is Verdict.PASSES


def test_scores_are_those_of_visible_pairs_with_shared_keys() -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3, 2, 4, 5, generator=generator)
    key = torch.randn(3, 2, 2, 5, generator=generator)
    scores = attention_scores(query, key, scale=0.5)
    assert scores.shape == (2, 4, 6)
    # Pairs (query, key) in order: 00, 10, 11, 20, 21, 22; head 3 reads key head 1.
    expected = 0.5 * (query[2, 1, 3] * key[1, 1, 1]).sum()
    assert scores[1, 3, 4].item() == pytest.approx(expected.item(), rel=1e-5)


def test_scores_of_a_long_sequence_are_those_of_its_last_256_queries() -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(300, 1, 1, 4, generator=generator)
    key = torch.randn(300, 1, 1, 4, generator=generator)
    (scores,) = attention_scores(query, key, scale=0.5)[0]
    # Queries 44 to 299 see 45 to 300 keys.
    assert scores.shape == (sum(range(45, 301)),)
    whole = 0.5 * query[:, 0, 0] @ key[:, 0, 0].T
    expected = torch.cat([whole[place, : place + 1] for place in range(44, 300)])
    assert torch.allclose(scores, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "--steps is 0"),
        ({"seeds": 0}, "--seeds is 0"),
        ({"head_dim": 0}, "head.dim"),
        ({"base_width": 0}, "base.width"),
    ],
)
def test_plans_that_measure_nothing_are_refused(changes: dict[str, int], message: str) -> None:
    request = CheckRequest(widths=[64, 128], out=Path("never-made"), **changes)
    with pytest.raises(ConfigError, match=message):
        run_check(request, echo=silent)
    assert not Path("never-made").exists()


def test_missing_shards_are_an_error_before_any_work() -> None:
    runs = runs_at_widths(RunSource(preset="baseline", width=32, head_dim=16), [], [32, 64])
    with pytest.raises(DataError, match="train_data_path is empty"):
        measure(CheckPlan(runs=runs, with_data=True), Launch(), echo=silent)


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Exit code of the command line."""
    monkeypatch.setattr(sys, "argv", ["megatron-mup", "coord-check", *arguments])
    try:
        cli.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def test_the_command_ends_with_1_and_names_what_grows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--widths", "32,64", "--seeds", "1", "--steps", "1", "--out", str(tmp_path / "out")]
    assert command(monkeypatch, "--preset", "sp_simple", *small) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "FAILS: layer 1 scores grows as M^" in shown
    assert "layer 2 residual" in shown
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["coordinates.csv", "coordinates.png", "slopes.csv"]
    assert (tmp_path / "out" / "coordinates.png").read_bytes()[:4] == b"\x89PNG"
    # 2 widths, 1 seed, 2 steps, 11 modules and the header.
    assert len((tmp_path / "out" / "coordinates.csv").read_text().splitlines()) == 45


def test_the_command_ends_with_0_when_all_is_well(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    small = ["--widths", "32,128", "--seeds", "2", "--steps", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(coordinate_check, "draw", lambda *_, **__: None)
    assert command(monkeypatch, *small) == 0


def test_a_picture_can_have_panels_without_a_finite_number(tmp_path: Path) -> None:
    modules = recorded_modules(tiny("num_layers=1").model)
    rows = [
        Coordinate(width, 1, step, module, 1.0, math.nan if module == "logits" else 0.0)
        for width in (32, 64)
        for step in (0, 1)
        for module in modules
    ]
    fits = fit_coordinates(rows, tiny())
    assert {fit.verdict for fit in fits if fit.step} == {Verdict.DEAD, Verdict.DIVERGED}
    draw(rows, fits, tmp_path / "some.png", caption="")
    assert (tmp_path / "some.png").read_bytes()[:4] == b"\x89PNG"


def test_the_command_refuses_a_wrong_growth(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, "--grow", "layers") == 2
    assert "--grow is 'layers'; use one of heads, head-dim" in capsys.readouterr().err


def test_a_preset_gets_a_small_body_and_a_file_is_taken_as_it_is(tmp_path: Path) -> None:
    assert CheckRequest(widths=[64, 128]).source == RunSource(
        preset="baseline", width=64, head_dim=16, base_width=64
    )
    file = tmp_path / "run.yaml"
    assert CheckRequest(widths=[64, 128], config=file).source == RunSource(config=file)
    assert coordinate_check.DEFAULT_PRESET == "baseline"
