"""The target's files: what they say, and that a launch takes them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from megatron_mup.config_io import load_config
from megatron_mup.errors import ConfigError
from megatron_mup.launching.learning_rate import read_learning_rate, rule_warnings
from megatron_mup.transfer.campaign import target
from megatron_mup.transfer.campaign.target import (
    TargetFiles,
    interval_words,
    launch_line,
    prediction_record,
    write_target,
)
from tests.transfer.campaign.campaigns import TARGET, campaign_of, target_data
from tests.transfer.campaign.test_gate import fit_of


@pytest.fixture
def files(tmp_path: Path) -> TargetFiles:
    files = TargetFiles.below(tmp_path / "out")
    campaign = campaign_of(tmp_path, TARGET | {"optimizer": {"lr": 7.0, "weight_decay": 0.0}})
    fit = fit_of(value=-6.5, low=-6.75, high=-6.25)
    table = Path("/out/sweep/runs.csv")
    record = prediction_record(campaign, fit, table=table, warnings=["it trains longer"])
    write_target(files, campaign, proxy=campaign.proxies(tmp_path)[0].run, record=record)
    return files


def test_the_configuration_is_the_targets_with_the_predicted_rate(files: TargetFiles) -> None:
    sections = yaml.safe_load(files.config.read_text())
    # 2^-6.5, in place of the rate that the target's YAML had.
    assert sections["optimizer"].pop("lr") == pytest.approx(0.011048543456039806, rel=1e-12)
    assert sections == TARGET | {"optimizer": {"weight_decay": 0.0}}
    assert load_config(files.config).model.hidden_size == 512


def test_its_head_says_where_the_rate_comes_from(files: TargetFiles) -> None:
    lines = files.config.read_text().splitlines()
    head = [line for line in lines if line.startswith("#")]
    assert head[0].startswith("# Target of the campaign small: ")
    assert head[1] == "# predicted as 2^-6.500 = 0.0110485, 90% interval 2^-6.750 to 2^-6.250,"
    assert head[2] == "# from 45 runs of the arm mup at widths 32, 64, 128"
    assert head[3] == "# in /out/sweep/runs.csv."
    assert head[4] == "# Verdict: transfers: it moves by 0.30."
    assert head[5] == "# Not corrected for: it trains longer"


def test_a_launch_takes_the_prediction_without_a_warning(files: TargetFiles) -> None:
    tuned = read_learning_rate(files.prediction)
    assert tuned.lr == pytest.approx(0.011048543456039806, rel=1e-12)
    assert tuned.optimizer == "adam"
    assert rule_warnings(load_config(files.config), tuned) == []
    other = load_config(files.config, ["parameterization.name=sp"])
    assert "was tuned under another parameterization" in rule_warnings(other, tuned)[0]


def test_the_prediction_keeps_its_interval_and_its_proxies(files: TargetFiles) -> None:
    record = json.loads(files.prediction.read_text())
    assert record["interval"] == {"level": 0.9, "log2_low": -6.75, "log2_high": -6.25}
    origin = record["provenance"]
    assert (origin["campaign"], origin["arm"], origin["runs"]) == ("small", "mup", 45)
    assert origin["target_hidden_size"] == 512
    assert origin["proxies"][1] == {
        "hidden_size": 64,
        "log2_lr": -6.0,
        "level": 0.9,
        "log2_low": -6.1,
        "log2_high": -5.9,
    }
    assert origin["not_corrected_for"] == ["it trains longer"]


def test_a_target_without_shards_is_given_those_of_the_proxies(tmp_path: Path) -> None:
    files = TargetFiles.below(tmp_path)
    bare = {section: options for section, options in TARGET.items() if section != "data"}
    campaign = campaign_of(tmp_path, bare | {"data": {"eod_token": 1}})
    fit = fit_of(value=-6.5, low=-6.75, high=-6.25)
    record = prediction_record(campaign, fit, table=Path("runs.csv"), warnings=[])
    write_target(files, campaign, proxy=campaign.proxies(tmp_path)[0].run, record=record)
    assert yaml.safe_load(files.config.read_text())["data"] == {
        "eod_token": 1,
        "train_data_path": [str(Path("shards/train").absolute())],
        "valid_data_path": [str(Path("shards/valid").absolute())],
    }
    # The record holds from any folder.
    assert record["provenance"]["table"] == str(Path("runs.csv").absolute())


def test_a_target_that_cannot_be_trained_at_the_rate_is_not_written(tmp_path: Path) -> None:
    files = TargetFiles.below(tmp_path)
    campaign = campaign_of(tmp_path)
    fit = fit_of(value=-6.5, low=-6.75, high=-6.25)
    record = prediction_record(campaign, fit, table=Path("runs.csv"), warnings=[])
    proxy = campaign.proxies(tmp_path)[0].run
    with pytest.raises(ConfigError, match=r"optimizer.lr is -1.0"):
        write_target(files, campaign, proxy=proxy, record=record | {"lr": -1.0})
    assert not files.config.exists()


def test_what_was_accepted_stands_in_both_files(tmp_path: Path) -> None:
    files = TargetFiles.below(tmp_path)
    campaign = campaign_of(tmp_path, gate={"accept": ["batch", "tokens"]})
    fit = fit_of(value=-6.5, low=-6.75, high=-6.25)
    record = prediction_record(campaign, fit, table=Path("runs.csv"), warnings=[])
    write_target(files, campaign, proxy=campaign.proxies(tmp_path)[0].run, record=record)
    provenance = json.loads(files.prediction.read_text())["provenance"]
    assert provenance["accepted"] == ["tokens", "batch"]
    assert "# Accepted by gate.accept: tokens, batch." in files.config.read_text().splitlines()


def test_the_configuration_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    monkeypatch.setattr(target, "publish_text", lambda path, _text: written.append(path.name))
    campaign = campaign_of(tmp_path)
    fit = fit_of(value=-6.5, low=-6.75, high=-6.25)
    record = prediction_record(campaign, fit, table=Path("runs.csv"), warnings=[])
    proxy = campaign.proxies(tmp_path)[0].run
    write_target(TargetFiles.below(tmp_path), campaign, proxy=proxy, record=record)
    assert written == ["prediction.json", "config.yaml"]


def test_both_files_are_removed_together(files: TargetFiles) -> None:
    assert files.remove()
    assert not files.config.exists()
    assert not files.prediction.exists()
    assert not files.remove()


def test_the_command_is_the_launch_script_or_train(tmp_path: Path) -> None:
    files = TargetFiles.below(Path("my out"))
    assert launch_line(files, campaign_of(tmp_path)) == (
        "megatron-mup train --config 'my out/target/config.yaml'"
    )
    split = target_data(parallel__tensor_model_parallel_size=2)
    assert launch_line(files, campaign_of(tmp_path, split)) == (
        "torchrun --nproc-per-node 2 -m megatron_mup train --config 'my out/target/config.yaml'"
    )
    (tmp_path / "mup_10b.sh").touch()
    options = {"config": "target.yaml", "launch": "mup_10b.sh"}
    assert launch_line(files, campaign_of(tmp_path, target=options)) == (
        f"LR_FROM='my out/target/prediction.json' bash {tmp_path}/mup_10b.sh"
    )


def test_a_missing_bound_is_said() -> None:
    assert interval_words({"level": 0.9, "log2_low": None, "log2_high": 1.0}) == (
        "without an interval"
    )
