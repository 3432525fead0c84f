"""The limits on speed, and the page that says whether this machine kept them."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform as python_platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from megatron_mup import __version__, platform
from megatron_mup.benchmark.loop_cost import ENGINE, PARTS, LoopCost
from megatron_mup.benchmark.measure import Ratio
from megatron_mup.benchmark.save_cost import SaveCost, Times
from megatron_mup.data.publication import publish_text
from megatron_mup.errors import ConfigError
from megatron_mup.os_processes import processor_name
from megatron_mup.revision import revision


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One row of the table.

    Attributes:
        first: name of the contestant that is judged.
        second: name of the yardstick.
        model: its size in words.
        limit: largest upper end of the interval that is accepted.
        ratio: the measurement.
    """

    first: str
    second: str
    model: str
    limit: float
    ratio: Ratio

    @property
    def met(self) -> bool:
        """Whether the whole interval lies within the limit."""
        # The ratio alone would pass half of the time at the limit itself.
        return self.ratio.high <= self.limit


@dataclass(frozen=True, kw_only=True)
class Circumstances:
    """What a measurement depends on besides the code."""

    machine: str
    software: str
    commit: str
    date: str
    command: str


def circumstances(command: str) -> Circumstances:
    """Describe this machine, the installed versions, the commit and the time.

    Args:
        command: the command line that measures, for the reader to repeat.
    """
    packages = ", ".join(f"{name} {number}" for name, number in _versions().items())
    python = python_platform.python_version()
    now = datetime.datetime.now(datetime.UTC)
    return Circumstances(
        machine=f"{processor_name()}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} thread(s) used",
        software=f"megatron_mup {__version__}, {packages}, Python {python}",
        commit=revision(),
        date=now.strftime("%Y-%m-%d %H:%M UTC"),
        command=command,
    )


def _versions() -> dict[str, str]:
    """What computes: on a GPU, CUDA's libraries and TransformerEngine as well."""
    found = {name: version(name) for name in ("megatron-core", "torch")}
    if not platform.has_cuda():
        return found
    cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    found |= {"CUDA": str(torch.version.cuda), "cuDNN": str(cudnn)}
    with contextlib.suppress(PackageNotFoundError):
        found["transformer-engine"] = version("transformer-engine")
    return found


_HEADER = (
    "| step of | against | model | pairs | CPU-seconds | ratio | 95% interval | at most | met |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


_LOOP_HEADER = (
    "| model | steps | step | schedule and optimizer | loop's share | at most | met |\n"
    "|---|---|---|---|---|---|---|"
)

_LOOP_PARTS = [part for part in PARTS if part != ENGINE]

_PROFILE_HEADER = (
    f"| model | {' | '.join(_LOOP_PARTS)} | loop |\n|---|{'---|' * len(_LOOP_PARTS)}---|"
)

_SAVE_HEADER = (
    "| model | saves | what | ms | in steps | under | met |\n|---|---|---|---|---|---|---|"
)


def table(comparisons: Sequence[Comparison]) -> str:
    """Markdown table with one row per comparison."""
    rows = [
        f"| {row.first} | {row.second} | {row.model} | {row.ratio.pairs} "
        f"| {row.ratio.first_seconds:.3f} / {row.ratio.second_seconds:.3f} "
        f"| {row.ratio.value:.3f} | {row.ratio.low:.3f} to {row.ratio.high:.3f} "
        f"| {row.limit:.2f} | {'yes' if row.met else 'NO'} |"
        for row in comparisons
    ]
    return "\n".join([_HEADER, *rows])


def loop_table(costs: Sequence[LoopCost]) -> str:
    """Markdown table of what the training loop costs, one row per model."""
    rows = [
        f"| {cost.model} | {cost.steps} | {cost.step_seconds:.3f} | {cost.engine_seconds:.3f} "
        f"| {cost.share:.2%} | {cost.limit:.0%} | {'yes' if cost.met else 'NO'} |"
        for cost in costs
    ]
    return "\n".join([_LOOP_HEADER, *rows])


def profile_table(costs: Sequence[LoopCost]) -> str:
    """Markdown table of where the loop's own time goes, one row per model."""
    rows = []
    for cost in costs:
        seconds = [cost.seconds[part] for part in _LOOP_PARTS]
        cells = [
            f"{part * 1000:.2f} ({part / cost.step_seconds:.2%})"
            for part in (*seconds, sum(seconds))
        ]
        rows.append(f"| {cost.model} | {' | '.join(cells)} |")
    return "\n".join([_PROFILE_HEADER, *rows])


def save_table(costs: Sequence[SaveCost]) -> str:
    """Markdown table of what saving costs, a few rows per model."""
    rows = []
    for cost in costs:
        verdict = f"{cost.limit:g} step | {'yes' if cost.met else 'NO'}"
        named: list[tuple[str, Times, str]] = [
            ("background: staging, forking", cost.start, " | "),
            ("background: publishing", cost.publishing, " | "),
            ("background: training stopped, in all", cost.stopped, verdict),
            ("background: steps beside the writer slowed by", cost.slowed, " | "),
            ("at once", cost.at_once, " | "),
            ("a step", cost.step, " | "),
            ("a step beside the writer", cost.beside, " | "),
        ]
        for name, found, judged in named:
            steps = Times(found.median / cost.step.median, found.worst / cost.step.median)
            rows.append(
                f"| {cost.model} | {cost.saves} | {name} "
                f"| {found.median * 1000:.0f} / {found.worst * 1000:.0f} "
                f"| {steps.median:.3f} / {steps.worst:.3f} | {judged} |"
            )
    return "\n".join([_SAVE_HEADER, *rows])


def _where(where: Circumstances) -> str:
    return f"""| | |
|---|---|
| machine | {where.machine} |
| versions | {where.software} |
| commit | {where.commit} |
| date | {where.date} |
| command | `{where.command}` |"""


def document(
    comparisons: Sequence[Comparison],
    loops: Sequence[LoopCost],
    saves: Sequence[SaveCost],
    where: Circumstances,
) -> str:
    """The whole page of a measurement, Markdown.

    Args:
        comparisons: rows of the first table.
        loops: rows of the two tables on the loop.
        saves: rows of the table on checkpoints.
        where: machine, versions, commit, date and command of the measurement.
    """
    return f"""# Speed of a training step

Written by `make bench`, which overwrites this page. CPU-seconds are medians per step, first /
second; a ratio above 1 means that the step in the first column needs more than the one in the
second.

{table(comparisons)}

{_LOOP_TEXT}

{loop_table(loops)}

Where the loop's own time goes, in ms per step and as a share of the step (means).

{profile_table(loops)}

{_SAVE_TEXT}

{save_table(saves)}

{_where(where)}

{_METHOD}"""


# Constants, so that no measurement's number can slip into what does not depend on it.
_LOOP_TEXT = """\
The loop around the step, in seconds of wall clock (means over steps); the loop's share is
everything but Megatron's pipeline schedule and optimizer step."""

_SAVE_TEXT = """\
What saving costs, median / worst: a run saves in the background (`checkpoint.async_save`) and at
once by turns, with steps between; "stopped" is all time between two steps while a background save
is under way, "slowed" what its steps took longer than the median of steps without a writer. On a
CPU the writer competes with training for the cores, and after the fork the first write to each
page of memory copies it; where "slowed" exceeds "at once", a background save costs more in all."""

_METHOD = """## What is measured

One whole optimizer step (zeroing, forward, backward, clipping, AdamW) in fp32 on sequences of 256
random tokens, eight per step. Both steps of a pair run in one process, one after the other on the
same batch, and the order turns round from pair to pair. The clock counts the CPU time of all
threads of the process, so other processes do not enter directly. The ratio is the geometric mean
over pairs without the outer tenths; the interval is its 95% percentile bootstrap over pairs. A
limit is kept when the upper end of the interval is within it.

- **muP**: this package with width multiplier 4 and every multiplier different from 1 (embedding 2,
  residual branches 0.5, logits 1/4, attention 1/D) and one optimizer group per learning rate.
- **stock Megatron-Core**: GPTModel, DDP, schedule and optimizer from upstream's parts, with the
  same layer spec, multipliers of 1, no hooks and the standard optimizer groups.
- **plain PyTorch**: `megatron_mup/benchmark/plain_gpt.py`: `nn.Linear`, fused attention, rotary
  angles computed once, `torch.optim.AdamW`. It computes the same loss from the same weights
  (tested).

3M is hidden size 256 with 4 layers, 11M is hidden size 384 with 6 layers; the vocabulary has 512
entries and is untied.

## What makes it fast on a CPU

- Fused attention (`SdpaCoreAttention`) instead of Megatron's unfused one.
- Rotary cosines and sines are computed once instead of twice per layer and step
  (`model/rotary.py`); results are those of upstream bit for bit.
- The residual multiplier is part of the addition to the residual stream.
- glibc keeps freed activations instead of returning them to the kernel (`platform.py`).
"""


def write(path: Path, text: str) -> None:
    """Write a page so that no reader ever sees half of it.

    Raises:
        ConfigError: the folder does not exist or cannot be written to.
    """
    try:
        publish_text(path, text)
    except OSError as error:
        raise ConfigError(
            f"--output {path} cannot be written ({error.strerror}); give a file in a folder that "
            "exists and that you may write to"
        ) from error
