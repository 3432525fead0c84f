"""``megatron-mup quickstart``: see muP's learning rate transfer on this machine, on real text.

A small sweep of muP and SP at several widths, and its report. Its YAML is kept in the folder, so
that it can be changed and run with ``megatron-mup sweep``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_mup.data.publication import publish_text
from megatron_mup.data.shards import unigram_entropy
from megatron_mup.errors import ConfigError
from megatron_mup.transfer.sweep.cells import make_cells
from megatron_mup.transfer.sweep.folder import SweepFolder
from megatron_mup.transfer.sweep.pool import Share
from megatron_mup.transfer.sweep.session import RunRequest, run_sweep
from megatron_mup.transfer.sweep.spec import sweep_from_dict
from megatron_mup.transfer.sweep.text_source import check_text

BASE_WIDTH = 32
HEAD_DIM = 16
VOCAB_SIZE = 1024
SEQ_LENGTH = 128
BATCH_SIZE = 16
NUM_LAYERS = 2
EVAL_TOKENS = 32_768

LOG2_LRS = (-8.0, -7.0, -6.0, -5.0, -4.0, -3.0, -2.0)

Print = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class QuickstartPlan:
    """What the quickstart runs.

    Attributes:
        out: folder of the sweep: text, shards, table of runs, report.
        text: the user's text files; empty means the folder's own shards, or installed Python
            sources and documentation where it has none.
        widths: hidden sizes, the smallest first.
        log2_lrs: grid of base learning rates, increasing.
        steps: optimizer steps of each run.
        seeds: of weights and data order; all but the first only an octave around the best rate.
    """

    out: Path
    text: tuple[Path, ...] = ()
    widths: tuple[int, ...] = (32, 64, 128)
    log2_lrs: tuple[float, ...] = LOG2_LRS
    steps: int = 200
    seeds: tuple[int, ...] = (1, 2, 3)

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
        if self.steps < 1:
            raise ConfigError(f"--steps is {self.steps}; give at least 1")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ConfigError(
                f"--seeds is {_listed(self.seeds)}; give whole numbers from 0, each once"
            )


def _listed(numbers: Sequence[float]) -> str:
    return ",".join(f"{number:g}" for number in numbers)


def sweep_document(plan: QuickstartPlan) -> dict[str, Any]:
    """The sweep's YAML as plain data: the paper's architecture, small.

    Args:
        plan: what to run.
    """
    return {
        "name": "quickstart",
        "base": {
            "model": {
                "num_layers": NUM_LAYERS,
                "hidden_size": BASE_WIDTH,
                "num_attention_heads": BASE_WIDTH // HEAD_DIM,
                "seq_length": SEQ_LENGTH,
                "activation": "squared_relu",
            },
            "parameterization": {
                "base_hidden_size": BASE_WIDTH,
                "base_ffn_hidden_size": 4 * BASE_WIDTH,
                "base_kv_channels": HEAD_DIM,
                "base_num_layers": NUM_LAYERS,
                # The same for both arms: the picture is to compare parameterizations and nothing
                # else.
                "q_init": "zero",
            },
            "training": {"global_batch_size": BATCH_SIZE, "micro_batch_size": BATCH_SIZE},
        },
        "scale": {"axis": "width", "values": list(plan.widths)},
        "learning_rate": {"log2": list(plan.log2_lrs)},
        "seeds": list(plan.seeds),
        "seeds_within_octaves": 1,
        "tokens": {"rule": "fixed_tokens", "tokens": plan.steps * BATCH_SIZE * SEQ_LENGTH},
        # Large rates fail without warmup at every width; a tenth of the run costs little of it.
        "warmup_fraction": 0.1,
        "arms": {name: {"parameterization.name": name} for name in ("mup", "sp")},
        "text": {"vocab_size": VOCAB_SIZE},
        "run": {"eval_tokens": EVAL_TOKENS},
    }


def run_quickstart(plan: QuickstartPlan, share: Share, echo: Print) -> int:
    """Run what is missing of the sweep, and report on it.

    Args:
        plan: what to run and where.
        share: processes to use.
        echo: receives progress, the table and where the pictures are.

    Returns:
        The process's exit code: that of ``run_sweep``.

    Raises:
        MupError: as ``run_sweep``, or the report cannot be written.
    """
    document = sweep_document(plan)
    # What cannot be trained, or not on this text, is refused before the folder is touched.
    data = SweepFolder(plan.out).data
    make_cells(sweep_from_dict(document, origin="quickstart"), data)
    check_text(data, plan.text)
    plan.out.mkdir(parents=True, exist_ok=True)
    config = plan.out / "quickstart.yaml"
    publish_text(config, yaml.safe_dump(document, sort_keys=False))
    request = RunRequest(config=config, out=plan.out, text=plan.text, share=share)
    code = run_sweep(request, echo)
    if code == 0:
        _report(plan, config, echo)
    return code


def _report(plan: QuickstartPlan, config: Path, echo: Print) -> None:
    # Late, because fits and figures take a second to import, and errors above are to come at once.
    from megatron_mup.transfer.report.command import make_folder_report, summary

    report = make_folder_report(plan.out)
    for line in summary(report):
        echo(line)
    train, valid = (plan.out / "data" / f"text_{part}" for part in ("train", "valid"))
    entropy = unigram_entropy(train, valid, VOCAB_SIZE)
    echo(f"token frequencies alone: {entropy:.4f} nats per token (unigram entropy, held-out text)")
    pictures = [str(path) for path in report.figures if path.suffix == ".png"]
    echo(f"pictures: {', '.join(pictures)}")
    echo(f"to change it: edit {config}, then 'megatron-mup sweep run {config} --out {plan.out}'")
