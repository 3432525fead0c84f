"""The whole benchmark at a tiny size: real steps, few pairs, one thread."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from megatron_mup.benchmark import __main__ as command
from megatron_mup.benchmark import compare as comparing
from megatron_mup.benchmark import loop_cost, save_cost
from megatron_mup.benchmark.compare import compare
from megatron_mup.benchmark.contestants import (
    TrainStep,
    benchmark_run,
    mup_contestant,
    plain_contestant,
    random_batches,
    stock_contestant,
)
from megatron_mup.config import RunConfig
from megatron_mup.training.batches import Batch
from megatron_mup.training.processes import Launch, parallel_processes

TINY = {"tiny": benchmark_run(hidden_size=64, num_layers=1, seq_length=16, batch_size=2)}


def slowed(run: RunConfig) -> TrainStep:
    """The muP step, and as much CPU time again as it took, and again."""
    step = mup_contestant(run)

    def slow(batch: Batch) -> float:
        start = time.process_time()
        loss = step(batch)
        until = time.process_time() + 2 * (time.process_time() - start)
        while time.process_time() < until:
            pass
        return loss

    return slow


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(command, "SIZES", TINY)
    monkeypatch.setattr("sys.argv", ["benchmark", *arguments])
    threads = torch.get_num_threads()
    with pytest.raises(SystemExit) as ended:
        command.main()
    torch.set_num_threads(threads)
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_every_multiplier_of_the_muP_run_differs_from_one() -> None:
    for run in (*comparing.SIZES.values(), *TINY.values()):
        multipliers = run.table.multipliers
        assert (multipliers.embedding, multipliers.residual) == (2.0, 0.5)
        assert (multipliers.logit, multipliers.attention) == (0.25, 1 / 64)


def test_the_sizes_are_those_of_the_table() -> None:
    with_embeddings = {"3M": 3.4e6, "11M": 11.0e6}
    for name, run in comparing.SIZES.items():
        hidden, layers = run.model.hidden_size, run.model.num_layers
        count = 12 * layers * hidden**2 + 2 * run.model.padded_vocab_size * hidden
        assert count == pytest.approx(with_embeddings[name], rel=0.01)


@pytest.mark.parametrize("build", [mup_contestant, stock_contestant, plain_contestant])
def test_every_contestant_trains(build: object) -> None:
    run = TINY["tiny"]
    (batch,) = random_batches(run, 1)
    with parallel_processes(run, Launch()):
        step = build(run)  # type: ignore[operator]
        losses = [step(batch) for _ in range(30)]
    # 512 tokens: ln 512 = 6.24 nats before the batch is learned by heart.
    assert losses[0] > 5.5
    assert losses[-1] < 0.8 * losses[0]


def test_a_slowed_model_is_reported_as_slower() -> None:
    lines: list[str] = []
    stock, plain = compare(TINY, pairs=8, echo=lines.append, mup=slowed)
    assert lines == [
        "muP against stock Megatron-Core, tiny: 8 pairs of steps",
        "muP against plain PyTorch, tiny: 4 pairs of steps",
    ]
    assert (stock.limit, plain.limit) == (1.03, 1.10)
    for row in (stock, plain):
        assert row.ratio.low > 1.5
        assert not row.met


def test_the_command_keeps_and_prints_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loop_cost, "LIMIT", 1.0)
    monkeypatch.setattr(save_cost, "LIMIT", 10_000.0)
    monkeypatch.setattr(comparing, "STOCK_LIMIT", 100.0)
    monkeypatch.setattr(comparing, "PLAIN_LIMIT", 100.0)
    page = tmp_path / "page.md"
    code = run_command(monkeypatch, "--pairs", "4", "--threads", "1", "--output", str(page))
    assert code == 0
    rows = [line for line in page.read_text().splitlines() if line.startswith("| muP |")]
    assert [row.split(" | ")[1] for row in rows] == ["stock Megatron-Core", "plain PyTorch"]
    assert all(row.endswith("| 100.00 | yes |") for row in rows)
    (loop_row,) = [
        line for line in page.read_text().splitlines() if line.startswith("| tiny | 10 ")
    ]
    share = float(loop_row.split(" | ")[4].removesuffix("%"))
    assert 0 < share < 100
    rows += [line for line in page.read_text().splitlines() if line.startswith("| tiny | 2 | ")]
    assert len(rows) == 2 + 7
    printed = capsys.readouterr().out
    assert all(row in printed for row in rows)
    assert "python -m megatron_mup.benchmark --pairs 4 --threads 1" in page.read_text()


def test_a_missed_demand_is_kept_named_and_ends_with_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loop_cost, "LIMIT", 0.0)
    monkeypatch.setattr(save_cost, "LIMIT", 0.0)
    monkeypatch.setattr(comparing, "STOCK_LIMIT", 0.01)
    monkeypatch.setattr(comparing, "PLAIN_LIMIT", 100.0)
    page = tmp_path / "page.md"
    code = run_command(monkeypatch, "--pairs", "2", "--threads", "1", "--output", str(page))
    assert code == 1
    assert "| 0.01 | NO |" in page.read_text()
    slow, loop, save = capsys.readouterr().err.splitlines()
    assert slow.startswith("muP against stock Megatron-Core (tiny): the interval ends at")
    assert loop.startswith("the loop takes ")
    assert save.startswith("a background save stops training for ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pairs", "1"], "error: --pairs is 1; an interval needs at least 2"),
        (["--threads", "0"], "error: --threads is 0; this machine has"),
        (["--output", "nowhere/page.md"], "the folder nowhere does not exist; make it"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_measured(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "compare", None)
    output = [] if "--output" in arguments else ["--output", "page.md"]
    threads = [] if "--threads" in arguments else ["--threads", "1"]
    assert run_command(monkeypatch, *arguments, *threads, *output) == 2
    assert message in capsys.readouterr().err
