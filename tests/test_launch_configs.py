"""Configurations of the launch scripts are the runs they claim to be, and fit their resources."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from megatron_mup.config import RunConfig
from megatron_mup.config_io import config_to_dict, load_config
from megatron_mup.dry_run import dry_run
from megatron_mup.run_source import RunSource

LAUNCH = Path(__file__).parents[1] / "launch"
CONFIGS = sorted((LAUNCH / "configs").glob("*.yaml"))
RATE = "lr=0.01"


def config(name: str, *overrides: str) -> RunConfig:
    return load_config(LAUNCH / f"configs/{name}.yaml", overrides)


def ranks(script: str, nodes: int | None = None) -> int:
    text = (LAUNCH / f"{script}.sh").read_text()
    found = re.search(r"^#SBATCH --nodes=(\d+)$", text, flags=re.MULTILINE)
    tasks = re.search(r"^#SBATCH --ntasks-per-node=(\d+)$", text, flags=re.MULTILINE)
    assert found is not None
    assert tasks is not None
    return (nodes or int(found[1])) * int(tasks[1])


def width(hidden_size: int) -> list[str]:
    return [f"hidden_size={hidden_size}", f"num_attention_heads={hidden_size // 128}"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_each_configuration_has_a_script_whose_ranks_it_fits(path: Path) -> None:
    overrides = [] if "\n  lr: " in path.read_text() else [RATE]
    report = dry_run(load_config(path, overrides), world_size=ranks(path.stem))
    assert report.data_parallel_size >= 1
    assert f"configs/{path.name}" in (LAUNCH / f"{path.stem}.sh").read_text()


def test_the_10b_run_is_the_paper_s() -> None:
    run = config("mup_10b", RATE)
    report = dry_run(run, world_size=ranks("mup_10b"))
    # 12 layers of 12 x 8192 x 8192, and two matrices of 32128 x 8192.
    assert report.matrix_elements + report.other_elements == 10_190_061_568
    assert (report.world_size, report.data_parallel_size, report.microbatches) == (128, 64, 4)
    assert run.training.global_batch_size * run.model.seq_length == 2**21
    assert (run.training.train_iters, run.schedule.lr_warmup_iters) == (90_000, 7_000)
    assert (run.model.num_attention_heads, run.model.ffn_width) == (64, 32768)
    assert run.model.activation == "squared_relu"
    assert (run.optimizer.optimizer, run.optimizer.weight_decay) == ("lion", 1e-4)
    assert (run.optimizer.lion_beta1, run.optimizer.lion_beta2) == (0.95, 0.98)
    assert run.optimizer.weight_decay_mode == "independent"
    assert (run.parameterization.name, run.parameterization.q_init) == ("abs_mup", "zero")
    assert (run.model.transformer_impl, run.precision.fp8_format) == (
        "transformer_engine",
        "hybrid",
    )


@pytest.mark.parametrize(
    ("name", "preset", "hidden_size", "rate"),
    [
        ("mup_10b", "combined", 8192, [RATE]),
        ("mup_10b_adamw", "combined_no_wd", 8192, []),
        ("mup_proxy", "combined", 512, [RATE]),
    ],
)
def test_each_run_of_the_paper_is_its_preset(
    name: str, preset: str, hidden_size: int, rate: list[str]
) -> None:
    ours = config(name, *rate, *(width(hidden_size) if name == "mup_proxy" else []))
    theirs = RunSource(preset=preset, width=hidden_size).load(
        [*rate, "data.train_data_path=[x]", "data.valid_data_path=[x]"]
    )
    assert ours.table.rows == theirs.table.rows
    assert ours.schedule == theirs.schedule
    assert ours.optimizer == theirs.optimizer
    for option in ("train_iters", "global_batch_size", "loss_denominator", "seed"):
        assert getattr(ours.training, option) == getattr(theirs.training, option)
    for option in ("sample_layout", "eod_token", "bos_token", "eod_mask_loss"):
        assert getattr(ours.data, option) == getattr(theirs.data, option)
    local = dataclasses.replace(ours.model, transformer_impl=theirs.model.transformer_impl)
    assert local == theirs.model


@pytest.mark.parametrize(
    ("hidden_size", "nodes"), [(128, 1), (256, 1), (512, 1), (1024, 2), (2048, 4), (4096, 8)]
)
def test_the_proxies_fit_the_nodes_that_they_ask_for(hidden_size: int, nodes: int) -> None:
    run = config("mup_proxy", RATE, *width(hidden_size))
    report = dry_run(run, world_size=ranks("mup_proxy", nodes))
    assert report.matrix_elements == 12 * 12 * hidden_size**2
    assert report.stages[0].memory.total < 60 * 2**30


def test_the_variant_for_use_differs_in_length_and_packing_alone() -> None:
    paper, ours = (config_to_dict(config(name, RATE)) for name in ("mup_10b", "mup_10b_4096"))
    differing = {
        f"{section}.{option}": value
        for section, options in ours.items()
        for option, value in options.items()
        if value != paper[section][option]
    }
    assert differing == {
        "model.seq_length": 4096,
        "training.global_batch_size": 512,
        "training.micro_batch_size": 2,
        "training.loss_denominator": "tokens",
        "data.sample_layout": "packed",
        "checkpoint.save": "runs/mup_10b_4096/checkpoints",
        "checkpoint.load": "runs/mup_10b_4096/checkpoints",
    }
