"""``megatron-mup quickstart``: see muP's learning rate transfer on this machine, on real text.

Makes a tokenizer and token shards from installed Python sources and documentation (or the user's
text), trains muP and SP at several widths over one grid of learning rates, and ends with a table
and a picture. Each finished run is a CSV row; started again, it runs only what is missing.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_mup.config import RunConfig
from megatron_mup.config_io import config_from_dict
from megatron_mup.data.publication import publish_text
from megatron_mup.data.shards import unigram_entropy
from megatron_mup.errors import ConfigError
from megatron_mup.revision import revision
from megatron_mup.transfer.picture import curves_of, draw, table_lines
from megatron_mup.transfer.quickstart_data import make_shards
from megatron_mup.transfer.records import Cell, Record, append_record, read_records

BASE_WIDTH = 32
HEAD_DIM = 16
VOCAB_SIZE = 1024
SEQ_LENGTH = 128
BATCH_SIZE = 16
NUM_LAYERS = 2
EVAL_BATCHES = 16
"""Held-out batches per run: 32,768 tokens."""

CORPUS_BYTES = 6_000_000
LOG2_LRS = (-9.0, -8.0, -7.0, -6.0, -5.0, -4.0, -3.0, -2.0)
WIDTHS = (32, 64, 128)
PARAMETERIZATIONS = ("mup", "sp")

Print = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class QuickstartPlan:
    """What the quickstart runs.

    Attributes:
        out: folder for text, shards, records, table and picture.
        text: the user's text files; empty means installed Python sources and documentation.
        widths: hidden sizes, the smallest first.
        log2_lrs: grid of base learning rates, increasing.
        steps: optimizer steps of each run.
        workers: runs at a time, one thread each.
        seed: seed of weights and data order.
    """

    out: Path
    text: tuple[Path, ...] = ()
    widths: tuple[int, ...] = WIDTHS
    log2_lrs: tuple[float, ...] = LOG2_LRS
    steps: int = 200
    workers: int = 2
    seed: int = 1

    def __post_init__(self) -> None:
        """Refuse plans that cannot show anything; raises ConfigError."""
        # Heads have a fixed dim, so that width alone changes from run to run.
        wrong = [width for width in self.widths if width <= 0 or width % HEAD_DIM]
        if wrong or not self.widths or list(self.widths) != sorted(set(self.widths)):
            raise ConfigError(
                f"--widths is {_listed(self.widths)}; give positive multiples of {HEAD_DIM} (the "
                "head dim), each once, the smallest first"
            )
        rates = self.log2_lrs
        # A vertex needs a minimum with a neighbour on either side.
        if (
            len(rates) < 3
            or not all(map(math.isfinite, rates))
            or list(rates) != sorted(set(rates))
        ):
            raise ConfigError(
                f"--log2-lrs is {_listed(rates)}; give at least 3 finite numbers, the smallest "
                "first, each once"
            )
        if self.steps < 1 or self.workers < 1:
            raise ConfigError(
                f"--steps is {self.steps} and --workers is {self.workers}; both must be at least 1"
            )

    @property
    def cells(self) -> list[Cell]:
        """All runs, the most expensive first, so that workers end together."""
        return [
            Cell(parameterization, width, log2_lr, self.seed, self.steps)
            for width in sorted(self.widths, reverse=True)
            for parameterization in PARAMETERIZATIONS
            for log2_lr in self.log2_lrs
        ]


def _listed(numbers: Sequence[float]) -> str:
    return ",".join(f"{number:g}" for number in numbers)


def cell_config(cell: Cell, folder: Path) -> RunConfig:
    """Configuration of one run: the paper's architecture, small (head dim 16, two layers).

    Args:
        cell: the run; its parameterization is the only difference between muP and SP.
        folder: holds the shards ``text_train`` and ``text_valid``.
    """
    sections: dict[str, dict[str, Any]] = {
        "model": {
            "num_layers": NUM_LAYERS,
            "hidden_size": cell.width,
            "num_attention_heads": cell.width // HEAD_DIM,
            "vocab_size": VOCAB_SIZE,
            "seq_length": SEQ_LENGTH,
            "activation": "squared_relu",
        },
        "parameterization": _parameterization(cell.parameterization),
        "optimizer": {"lr": 2.0**cell.log2_lr},
        # Large rates fail without warmup at every width; a tenth of the run costs little of it.
        "schedule": {"lr_warmup_iters": max(1, cell.steps // 10)},
        "training": {
            "train_iters": cell.steps,
            "global_batch_size": BATCH_SIZE,
            "micro_batch_size": BATCH_SIZE,
            "eval_iters": EVAL_BATCHES,
            "seed": cell.seed,
        },
        "data": {
            "train_data_path": [str(folder / "text_train")],
            "valid_data_path": [str(folder / "text_valid")],
        },
        "logging": {"log_interval": max(1, cell.steps // 10)},
    }
    return config_from_dict(sections)


def _parameterization(name: str) -> dict[str, Any]:
    return {
        "name": name,
        "base_hidden_size": BASE_WIDTH,
        "base_ffn_hidden_size": 4 * BASE_WIDTH,
        "base_kv_channels": HEAD_DIM,
        "base_num_layers": NUM_LAYERS,
        # An option of every parameterization. The same for both, because the picture is to compare
        # parameterizations and nothing else.
        "q_init": "zero",
    }


def run_cell(cell: Cell, folder: Path) -> Record:
    """Train one cell in this process.

    Args:
        cell: the run.
        folder: holds the shards; the process's index cache is made below it.
    """
    # torch takes seconds to import, which the command's --help and errors need not wait for.
    import torch

    from megatron_mup.training.loop import train
    from megatron_mup.training.processes import Launch

    # Models this small gain nothing from a second thread; parallelism comes from the workers.
    torch.set_num_threads(1)
    started = time.perf_counter()
    run = cell_config(cell, folder)
    # Megatron (0.19.2) writes its dataset index in place and takes any file under the name for a
    # whole one: a worker that started a moment later would read what another is still writing.
    cache = folder / "cache" / str(os.getpid())
    run = replace(run, data=replace(run.data, data_cache_path=str(cache)))
    result = train(run, launch=Launch(), echo=_silent)
    losses = [row["lm loss"] for row in result.history if "lm loss" in row]
    return Record(
        cell=cell,
        # A diverged run was not evaluated; its last finite loss would look like a result.
        validation_loss=math.nan if result.diverged else result.validation_loss or math.nan,
        train_loss=losses[-1],
        diverged=result.diverged,
        parameters=sum(math.prod(row.tensor.shape) for row in run.table.rows),
        tokens=result.iteration * BATCH_SIZE * SEQ_LENGTH,
        seconds=time.perf_counter() - started,
        commit=revision(),
    )


def _silent(_line: str) -> None:
    """Runs report through their records."""


def prepare_data(plan: QuickstartPlan, echo: Print) -> Path:
    """Make corpus, tokenizer and shards once; returns their folder."""
    return make_shards(
        plan.out / "data",
        text=plan.text,
        corpus_bytes=CORPUS_BYTES,
        vocab_size=VOCAB_SIZE,
        echo=echo,
    )


def run_quickstart(plan: QuickstartPlan, echo: Print = print) -> list[Record]:
    """Run everything that has no record yet.

    Args:
        plan: what to run and where.
        echo: receives progress lines.

    Returns:
        Records of all cells of the plan.
    """
    plan.out.mkdir(parents=True, exist_ok=True)
    folder = prepare_data(plan, echo)
    path = plan.out / "runs.csv"
    # A cell names everything that the plan can change, so a record of another plan in the same
    # folder is either this very run or left alone.
    done = {record.cell: record for record in read_records(path)}
    missing = [cell for cell in plan.cells if cell not in done]
    if done:
        echo(f"{len(plan.cells) - len(missing)} of {len(plan.cells)} runs are on record in {path}")
    # Only this process writes the file: two workers' rows could run into each other.
    for record in _run_all(missing, folder, plan.workers, echo):
        append_record(path, record)
        done[record.cell] = record
    return [done[cell] for cell in plan.cells]


def report_quickstart(plan: QuickstartPlan, records: Sequence[Record], echo: Print = print) -> Path:
    """Print the table of optima and draw the picture.

    Args:
        plan: the plan that made the records.
        records: from ``run_quickstart``.
        echo: receives the table.

    Returns:
        The picture's path; the table is beside it as Markdown.
    """
    folder = plan.out / "data"
    entropy = unigram_entropy(folder / "text_train", folder / "text_valid", VOCAB_SIZE)
    curves = curves_of(records)
    lines = table_lines(curves, entropy)
    tokens = plan.steps * BATCH_SIZE * SEQ_LENGTH
    source = "your text" if plan.text else "installed Python sources and documentation"
    caption = (
        f"{source}; {plan.steps} steps, {tokens:,} tokens a run; one seed; queries start at zero "
        "in both panels;\nstar: optimum, by a parabola through the lowest point and its neighbours "
        "(at an edge the lowest point itself); cross: diverged or above the axis"
    )
    picture = plan.out / "quickstart.png"
    draw(curves, entropy, picture, caption=caption)
    publish_text(plan.out / "quickstart.md", "\n".join([*lines, "", caption, ""]))
    for line in lines:
        echo(line)
    echo(f"unigram entropy of the held-out text: {entropy:.4f} nats per token")
    echo(f"picture: {picture}, table: {plan.out / 'quickstart.md'}, runs: {plan.out / 'runs.csv'}")
    return picture


def _run_all(cells: list[Cell], folder: Path, workers: int, echo: Print) -> Iterator[Record]:
    """Yield records as runs end; one process per worker serves many runs."""
    if not cells:
        return
    started = time.perf_counter()
    # Not forked: a child of a process with torch's threads can inherit a lock that nobody frees.
    context = multiprocessing.get_context("spawn")
    workers = min(workers, len(cells))
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        futures = [pool.submit(run_cell, cell, folder) for cell in cells]
        try:
            for count, future in enumerate(as_completed(futures), start=1):
                record = future.result()
                # Rather too long at first, because the largest models run first.
                left = (time.perf_counter() - started) / count * (len(cells) - count)
                echo(_progress(record, count, len(cells), left))
                yield record
        except BaseException:
            # Ctrl-C included: otherwise the pool would first finish every queued run.
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _progress(record: Record, count: int, total: int, seconds_left: float) -> str:
    cell = record.cell
    outcome = "diverged" if record.diverged else f"loss {record.validation_loss:.4f}"
    return (
        f"[{count}/{total}] {cell.parameterization:>3} width {cell.width:>4} "
        f"lr 2^{cell.log2_lr:g}: {outcome} ({record.seconds:.0f} s), "
        f"about {seconds_left / 60:.1f} min left"
    )
