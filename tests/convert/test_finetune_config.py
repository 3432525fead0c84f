"""An import brings the configuration of the run that starts from it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megatron_mup.cli import app as program
from megatron_mup.config import RunConfig
from megatron_mup.config_io import load_config
from megatron_mup.convert.commands import app
from megatron_mup.convert.finetune_config import write_finetune_config
from megatron_mup.convert.formats import HfFormat
from megatron_mup.convert.huggingface_target import write_huggingface
from megatron_mup.convert.megatron_source import MegatronSource
from tests.convert.command_calls import call
from tests.convert.counting_shards import write_shard
from tests.convert.memory_weights import random_weights, small_model

MUP = (
    "parameterization.name=mup",
    "base_hidden_size=16",
    "base_ffn_hidden_size=24",
    "base_num_layers=2",
    "base_kv_channels=8",
    "attention_scale=inverse",
    "optimizer.lr=0.003",
    "precision.bf16=true",
)


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    write_huggingface(random_weights(small_model()), tmp_path / "hf", hf_format=HfFormat.GRANITE)
    return tmp_path / "hf"


@pytest.mark.parametrize("target", [(), MUP], ids=["standard", "mup"])
def test_an_import_names_a_configuration_that_train_takes(
    target: tuple[str, ...], exported: Path, tmp_path: Path
) -> None:
    root = tmp_path / "imported"
    made = call(app, "from-hf", "--input", exported, "--save", root, "--no-verify", *target)
    file = root / "finetune.yaml"
    assert f"--config {file}" in made.stdout
    data = f"data.train_data_path=[{write_shard(tmp_path / 'text', 60)}]"
    dry = call(program, "train", "--dry-run", "--config", file, data, "eval_iters=0")
    assert dry.exit_code == 0
    # 21,664 numbers of the two layers of width 32, with their padded vocabulary.
    assert "21,664" in dry.stdout
    run, record = load_config(file), MegatronSource(root).run
    assert (run.model, run.parameterization) == (record.model, record.parameterization)
    assert (run.precision, run.optimizer) == (record.precision, record.optimizer)
    assert run.table.multipliers == record.table.multipliers
    assert (run.checkpoint.load, run.checkpoint.finetune) == (str(root), True)


def test_only_options_that_are_not_at_their_default_are_written(
    exported: Path, tmp_path: Path
) -> None:
    root = tmp_path / "imported"
    call(app, "from-hf", "--input", exported, "--save", root, "--no-verify")
    said = yaml.safe_load((root / "finetune.yaml").read_text())
    assert said["optimizer"] == {"lr": 0.001}
    assert set(said) == {"model", "parameterization", "optimizer", "training", "checkpoint"}
    assert said["training"] == {"train_iters": 1, "global_batch_size": 1, "micro_batch_size": 1}


def test_the_folder_is_named_so_that_a_run_finds_it_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.configurations import tiny

    run: RunConfig = tiny()
    monkeypatch.chdir(tmp_path)
    path = write_finetune_config(Path(), run)
    assert load_config(path).checkpoint.load == str(tmp_path)
