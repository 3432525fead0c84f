"""Alignment ratio and relative representation change against the step, by width and decay mode.

The central figure of arXiv:2510.19093, small: trains one model for each width, decay mode and seed,
measures its update dynamics, and writes dynamics.csv and dynamics.png. A run whose rows are there
is not run again.
"""

import argparse
import csv
import json
import math
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")
import matplotlib.pyplot as plt

from megatron_mup.diagnostics.dynamics_records import Quantity, read_dynamics

HEAD_DIM = 16
MATRICES = ("query", "key", "value", "attention_out", "ffn_in", "ffn_out")
QUANTITIES = (Quantity.ALIGNMENT_RATIO, Quantity.RELATIVE_CHANGE)
COLUMNS = ("mode", "width", "seed", "iteration", *(quantity.value for quantity in QUANTITIES))
# At the rate 2^-4 and width 32 all three forget in 53 steps.
MODES = {
    "coupled": ("weight_decay=0.3", "weight_decay_mode=coupled"),
    "constant_product": ("weight_decay=0.3", "weight_decay_mode=constant_product"),
    "independent": ("weight_decay=0.01875", "weight_decay_mode=independent"),
}


def arguments():
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=Path(__file__).with_name("config.yaml"))
    parser.add_argument("--out", type=Path, default=Path("runs/alignment"))
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--every", type=int, default=10, help="steps between measurements")
    parser.add_argument("overrides", nargs="*", help="key=value, before the other arguments")
    given = parser.parse_args()
    if len(set(given.widths)) < 2 or any(width <= 0 or width % HEAD_DIM for width in given.widths):
        parser.error(f"--widths is {given.widths}; give two or more multiples of {HEAD_DIM}")
    return given


def check_folder(given):
    """Refuse a folder that holds runs of other options."""
    text = given.config.read_text(encoding="utf-8")
    settings = json.dumps([text, given.overrides, given.every])
    record = given.out / "settings.json"
    given.out.mkdir(parents=True, exist_ok=True)
    if record.exists() and record.read_text(encoding="utf-8") != settings:
        sys.exit(f"{given.out} holds runs of another configuration; give another --out")
    record.write_text(settings, encoding="utf-8")


def train(given, mode, width, seed):
    """One run with its dynamics in a file of its own; returns the file."""
    rows = given.out / f"{mode}_{width}_{seed}.jsonl"
    if not rows.exists():
        running = rows.with_suffix(".running")
        running.unlink(missing_ok=True)
        options = [
            f"hidden_size={width}",
            f"num_attention_heads={width // HEAD_DIM}",
            f"seed={seed}",
            f"logging.diagnostics_path={running}",
            f"data.data_cache_path={given.out / 'cache'}",
            *MODES[mode],
            *given.overrides,
        ]
        command = [sys.executable, "-m", "megatron_mup", "train", "--config", str(given.config)]
        command += ["--diagnostics-interval", str(given.every), *options]
        done = subprocess.run(command, check=False)
        if done.returncode:
            sys.exit(f"the run {rows.stem} ended with exit code {done.returncode}; see above")
        running.rename(rows)
    return rows


def means(path):
    """Iteration -> the mean of each quantity over the hidden matrices."""
    found = defaultdict(lambda: defaultdict(list))
    for iteration, tensors in read_dynamics(path).items():
        for one in tensors:
            for quantity in QUANTITIES:
                value = one.values.get(quantity, math.nan)
                if one.role in MATRICES and math.isfinite(value):
                    found[iteration][quantity].append(value)
    return {
        iteration: [sum(by[quantity]) / len(by[quantity]) for quantity in QUANTITIES]
        for iteration, by in found.items()
        if all(by[quantity] for quantity in QUANTITIES)
    }


def draw(table, widths, modes, path):
    """A column for each mode, a line for each width: the mean over seeds."""
    figure, axes = plt.subplots(
        len(QUANTITIES),
        len(modes),
        figsize=(3.4 * len(modes), 5.4),
        sharex=True,
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    colors = plt.get_cmap("viridis_r")
    for column, mode in enumerate(modes):
        for line, quantity in enumerate(QUANTITIES):
            axis = axes[line][column]
            for index, width in enumerate(widths):
                points = defaultdict(list)
                for row in table:
                    if (row["mode"], row["width"]) == (mode, width):
                        points[row["iteration"]].append(row[quantity.value])
                color = colors(0.15 + 0.85 * index / max(1, len(widths) - 1))
                xs = sorted(points)
                ys = [sum(points[x]) / len(points[x]) for x in xs]
                axis.plot(xs, ys, color=color, label=f"width {width}")
            axis.set_yscale("log")
            axis.grid(alpha=0.3)
            if line == 0:
                axis.set_title(mode)
                axis.axhline(1.0, color="grey", linewidth=0.8, linestyle=":")
            if column == 0:
                axis.set_ylabel(quantity.value.replace("-", " "))
        axes[-1][column].set_xlabel("step")
    axes[0][-1].legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=200)


def slope(table, mode, column, iteration):
    """Exponent of a quantity in the width at one step, by least squares of logarithms."""
    points = [
        (math.log(row["width"]), math.log(row[column]))
        for row in table
        if (row["mode"], row["iteration"]) == (mode, iteration)
    ]
    x_mean, y_mean = (sum(values) / len(points) for values in zip(*points, strict=True))
    spread = sum((x - x_mean) ** 2 for x, _ in points)
    return sum((x - x_mean) * (y - y_mean) for x, y in points) / spread


def main():
    """Train what is missing, write the table and the picture, print exponents."""
    given = arguments()
    check_folder(given)
    table = []
    for mode in given.modes:
        for width in given.widths:
            for seed in given.seeds:
                for iteration, values in means(train(given, mode, width, seed)).items():
                    row = (mode, width, seed, iteration, *values)
                    table.append(dict(zip(COLUMNS, row, strict=True)))
    temporary = given.out / "dynamics.csv.tmp"
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    temporary.replace(given.out / "dynamics.csv")
    draw(table, given.widths, given.modes, given.out / "dynamics.png")
    steps = sorted({row["iteration"] for row in table})
    shown = dict.fromkeys((steps[0], steps[len(steps) // 2 - 1], steps[-1]))
    lines = ["exponent in the width at steps:"]
    for mode in given.modes:
        for quantity in QUANTITIES:
            at = {step: slope(table, mode, quantity.value, step) for step in shown}
            words = ", ".join(f"{step}: {value:+.2f}" for step, value in at.items())
            lines.append(f"  {mode:17} {quantity.value:31} {words}")
    lines.append(f"{given.out / 'dynamics.csv'}, {given.out / 'dynamics.png'}")
    print("\n".join(lines))  # noqa: T201  what this script is for


if __name__ == "__main__":
    main()
