"""The campaign's YAML: what it takes, what it refuses and how."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_mup.errors import ConfigError
from megatron_mup.transfer.campaign.gate import stops_before_runs
from megatron_mup.transfer.campaign.likeness import Kind, warnings
from megatron_mup.transfer.campaign.spec import CheckOptions, GateRules, load_campaign
from megatron_mup.transfer.campaign.target_data import check_target_data
from tests.transfer.campaign.acting import Acted, run
from tests.transfer.campaign.campaigns import (
    TARGET,
    campaign_data,
    campaign_of,
    target_data,
    write_campaign,
)

ROOT = Path(__file__).parents[3]


def test_what_is_left_out_has_the_documented_defaults(tmp_path: Path) -> None:
    campaign = campaign_of(tmp_path)
    assert campaign.gate == GateRules(
        fewest_sizes=3,
        largest_ratio=8.0,
        widest_interval=1.0,
        level=0.9,
        accept_cannot_tell=False,
        accept=(),
    )
    assert campaign.check == CheckOptions(widths=None, steps=4, seeds=3, options={})
    assert campaign.launch is None
    assert campaign.target.model.hidden_size == 512


def test_every_key_is_read(tmp_path: Path) -> None:
    (tmp_path / "mup_10b.sh").touch()
    campaign = campaign_of(
        tmp_path,
        arm="sp",
        target={"config": "target.yaml", "launch": "mup_10b.sh"},
        coordinate_check={"widths": [64, 128], "steps": 2, "seeds": 5, "options": {"lr": 0.5}},
        gate={
            "fewest_sizes": 4,
            "largest_ratio": 16,
            "widest_interval": 0.5,
            "level": 0.8,
            "accept_cannot_tell": True,
            "accept": ["batch", "tokens"],
        },
    )
    assert campaign.arm == "sp"
    assert campaign.launch == tmp_path / "mup_10b.sh"
    assert campaign.check == CheckOptions(widths=(64, 128), steps=2, seeds=5, options={"lr": 0.5})
    assert campaign.gate == GateRules(
        fewest_sizes=4,
        largest_ratio=16.0,
        widest_interval=0.5,
        level=0.8,
        accept_cannot_tell=True,
        accept=(Kind.TOKENS, Kind.BATCH),
    )


def test_a_sweep_may_be_a_file_beside_the_campaign(tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(campaign_data()["sweep"]))
    campaign = campaign_of(tmp_path, sweep="sweep.yaml")
    assert campaign.sweep.sizes == (32.0, 64.0, 128.0)
    # Seven rates and three seeds of one of two arms.
    assert len(campaign.proxies(tmp_path)) == 63


def test_a_base_may_be_a_whole_run_only_in_a_file(tmp_path: Path, acted: Acted) -> None:
    sweep = campaign_data()["sweep"]
    whole = sweep["base"] | {"optimizer": {"lr": 0.1}}
    with pytest.raises(ConfigError, match=r"base sets optimizer.lr, .* set by learning_rate"):
        campaign_of(tmp_path, sweep=sweep | {"base": whole})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(whole))
    code, lines = run(write_campaign(tmp_path, sweep=sweep | {"base": "run.yaml"}))
    assert code == 0
    assert lines[0] == "base: optimizer.lr is left out: in each run it is set by learning_rate"


def test_other_arms_are_left_out_with_their_learning_rates(tmp_path: Path) -> None:
    rates = {"log2": [-7, -6], "arms": {"sp": {"log2": [-9]}, "mup": {"log2": [-5, -4, -3]}}}
    sweep = campaign_data()["sweep"] | {"learning_rate": rates}
    campaign = campaign_of(tmp_path, sweep=sweep)
    assert campaign.sweep.log2_lrs == {"mup": (-5.0, -4.0, -3.0)}
    assert campaign.sweep.document["arms"] == {"mup": {}}
    del rates["arms"]["mup"]  # type: ignore[attr-defined]
    assert campaign_of(tmp_path, sweep=sweep).sweep.log2_lrs == {"mup": (-7.0, -6.0)}


def test_the_only_arm_need_not_be_named(tmp_path: Path) -> None:
    sweep = campaign_data()["sweep"] | {"arms": {"mine": {}}}
    assert campaign_of(tmp_path, sweep=sweep, arm=None).arm == "mine"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gates": {}}, r"unknown key 'gates'; known are name, sweep, arm"),
        ({"gate": {"ratio": 3}}, r"unknown key 'gate.ratio'; known are fewest_sizes"),
        ({"arm": "completep"}, r"arm is 'completep'; use one of mup, sp"),
        ({"arm": None}, r"arm is missing|arm is None"),
        ({"sweep": 3}, r"sweep is 3; give the sweep's YAML, here or as a path"),
        ({"target": {}}, r"target.config is missing"),
        (
            {"target": {"config": "target.yaml", "launch": "none.sh"}},
            r"target.launch names the script .*/none.sh, which is not there; give its path",
        ),
        ({"gate": {"widest_interval": 0}}, r"gate.widest_interval is 0; it must be above 0"),
        (
            {"gate": {"accept": ["width"]}},
            r"gate.accept is \['width'\]; give a list of tokens, depth, batch, sequence, rampup",
        ),
        ({"gate": {"accept": "tokens"}}, r"gate.accept is 'tokens'; give a list of tokens"),
        ({"gate": {"largest_ratio": 0.5}}, r"gate.largest_ratio is 0.5; it must be at least 1"),
    ],
)
def test_a_wrong_key_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        campaign_of(tmp_path, **changes)


def test_only_widths_are_predicted_and_one_curve_a_width(tmp_path: Path) -> None:
    sweep = campaign_data()["sweep"]
    depth = sweep | {"scale": {"axis": "depth", "values": [1, 2, 3]}}
    with pytest.raises(ConfigError, match=r"sweep scales the depth; .* set scale.axis width"):
        campaign_of(tmp_path, sweep=depth)
    with pytest.raises(ConfigError, match=r"sweep has the further axis clip_grad; .* remove axes"):
        campaign_of(tmp_path, sweep=sweep | {"axes": {"clip_grad": [0.5, 1]}})


def test_a_target_that_cannot_be_trained_is_refused_at_once(tmp_path: Path) -> None:
    path = write_campaign(tmp_path, target_data(model__num_attention_heads=7))
    with pytest.raises(ConfigError, match="num_attention_heads"):
        load_campaign(path)
    (tmp_path / "target.yaml").unlink()
    with pytest.raises(ConfigError, match=r"target.yaml"):
        load_campaign(path)
    with pytest.raises(ConfigError, match=r"there is no campaign '.*other.yaml'"):
        load_campaign(tmp_path / "other.yaml")


def test_a_target_on_the_proxies_shards_has_their_vocabulary(tmp_path: Path) -> None:
    bare = {section: dict(options) for section, options in TARGET.items() if section != "data"}
    del bare["model"]["vocab_size"]
    for sweep in (
        campaign_data()["sweep"],
        campaign_data()["sweep"] | {"text": {"vocab_size": 96}},
    ):
        if "text" in sweep:
            model = {key: value for key, value in TARGET["model"].items() if key != "vocab_size"}
            model |= {"hidden_size": 32, "num_attention_heads": 2}
            sweep["base"] = sweep["base"] | {"model": model, "data": {}}
        campaign = campaign_of(tmp_path, bare, sweep=sweep)
        assert campaign.target.model.vocab_size == 96
        assert campaign.target_sections["model"]["vocab_size"] == 96
    own = target_data(model__vocab_size=128)
    assert campaign_of(tmp_path, own).target.model.vocab_size == 128
    # Nobody knows the vocabulary of shards of its own.
    named = bare | {"data": TARGET["data"]}
    with pytest.raises(ConfigError, match=r"target.yaml: required option 'model.vocab_size' is no"):
        campaign_of(tmp_path, named)


def test_a_rate_of_the_targets_own_is_no_error(tmp_path: Path) -> None:
    own = TARGET | {"optimizer": {"lr": 0.25, "weight_decay": 0.1}}
    assert campaign_of(tmp_path, own).target.optimizer.weight_decay == 0.1


def test_the_example_asks_for_nothing_that_its_gate_would_stop(tmp_path: Path) -> None:
    campaign = load_campaign(ROOT / "examples/campaign/config.yaml")
    cells = campaign.proxies(tmp_path)
    # Five widths, seven rates, three seeds.
    assert len(cells) == 105
    assert campaign.gate.accept == ()
    proxy, budget = cells[-1].run, campaign.sweep.tokens
    stops = stops_before_runs(
        proxy,
        campaign.target,
        widths=campaign.sweep.sizes,
        rules=campaign.gate,
        budget=budget,
    )
    assert stops == []
    assert warnings(proxy, campaign.target, budget=budget) == []
    check_target_data(campaign.target, proxy, campaign.sweep.text)
