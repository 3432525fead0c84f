"""Whole training runs by the command line, each in a process of its own, on real text."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import yaml

from megatron_mup.training.metrics import read_metrics
from megatron_mup.transfer.sweep.shards import make_shards
from tests.distributed.spawn import ROOT

VOCAB_SIZE = 512


def write_config(folder: Path, *, corpus_bytes: int = 1_500_000) -> Path:
    """Shards of installed Python sources, and a configuration that trains on them."""
    data = make_shards(
        folder / "data",
        text=(),
        corpus_bytes=corpus_bytes,
        vocab_size=VOCAB_SIZE,
        echo=lambda _line: None,
    )
    sections = {
        "model": {
            "num_layers": 2,
            "hidden_size": 256,
            "num_attention_heads": 4,
            "vocab_size": VOCAB_SIZE,
            "seq_length": 128,
        },
        "parameterization": {
            "base_hidden_size": 128,
            "base_ffn_hidden_size": 512,
            "base_kv_channels": 64,
            "base_num_layers": 2,
        },
        "optimizer": {"lr": 2.0**-7, "weight_decay": 1e-4},
        "schedule": {"lr_warmup_iters": 2, "lr_decay_style": "constant"},
        "training": {
            "train_iters": 6,
            "global_batch_size": 8,
            "micro_batch_size": 8,
            "eval_iters": 0,
        },
        "data": {"train_data_path": [str(data / "text_train")]},
        "logging": {"log_interval": 1},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path


def steps_of(
    config: Path, name: str, *options: str, on_cpu: bool = False
) -> dict[int, list[float]]:
    """Train, and return loss and gradient norm of each iteration, exactly as computed.

    Args:
        config: from ``write_config``; metrics go beside it.
        name: of the run, one for each call.
        options: ``key=value``.
        on_cpu: hide the machine's GPUs from the run, and TransformerEngine, as on a CPU machine.
    """
    metrics = config.with_name(f"{name}.jsonl")
    hidden = _without_gpu(config.parent) if on_cpu else {}
    command = [sys.executable, "-m", "megatron_mup", "train", "--config", str(config)]
    done = subprocess.run(
        [*command, f"metrics_path={metrics}", *options],
        cwd=ROOT,
        env={**os.environ, **hidden},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return {
        int(row["iteration"]): [row["lm loss"], row["grad-norm"]]
        for row in read_metrics(metrics)
        if "lm loss" in row
    }


def _without_gpu(folder: Path) -> dict[str, str]:
    """Variables of a machine without GPUs; megatron-core takes its optimizers where it finds it."""
    engine = folder / "cpu_machine/transformer_engine.py"
    engine.parent.mkdir(exist_ok=True)
    engine.write_text('raise ModuleNotFoundError("not on a CPU machine")\n')
    folders = [str(engine.parent), os.environ.get("PYTHONPATH", "")]
    return {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(filter(None, folders))}


def losses(steps: dict[int, list[float]]) -> list[float]:
    """Training losses in order."""
    return [steps[iteration][0] for iteration in sorted(steps)]
