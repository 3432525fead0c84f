"""Where a launch takes its learning rate from, and what it says of one tuned under another rule."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_mup.config import RunConfig
from megatron_mup.config_io import config_from_dict, config_to_dict
from megatron_mup.errors import ConfigError
from megatron_mup.launching.learning_rate import (
    LearningRate,
    choose_learning_rate,
    learning_rate_factors,
    read_learning_rate,
    rule_warnings,
)
from tests.configurations import TINY, tiny

RELATIVE = {
    "name": "mup",
    "base_hidden_size": 128,
    "base_ffn_hidden_size": 512,
    "base_kv_channels": 128,
    "base_num_layers": 2,
}


def wide(rules: dict[str, Any], lr: float = 0.5) -> RunConfig:
    """Width 1024, FFN 4096, by the given rules."""
    model = {"num_layers": 2, "hidden_size": 1024, "num_attention_heads": 8, "vocab_size": 96,
             "seq_length": 16}  # fmt: skip
    training = {"train_iters": 6, "global_batch_size": 4, "micro_batch_size": 2}
    return config_from_dict(
        {"model": model, "parameterization": rules, "optimizer": {"lr": lr}, "training": training}
    )


def choose(
    sections: dict[str, Any], *overrides: str, lr: float | None = None, lr_from: Path | None = None
) -> LearningRate | None:
    return choose_learning_rate(sections, overrides, lr=lr, lr_from=lr_from)


def test_a_run_without_any_learning_rate_is_refused_with_the_ways_to_give_one() -> None:
    for sections in ({}, {"optimizer": {"optimizer": "lion"}}, {"optimizer": {"lr": None}}):
        with pytest.raises(ConfigError, match=r"no peak learning rate.*--lr .*LR=.*LR_FROM"):
            choose(sections)


def test_the_configuration_s_own_rate_and_an_override_stand() -> None:
    assert choose({"optimizer": {"lr": 0.1}}) is None
    assert choose({}, "lr=0.1") is None
    assert choose({}, "optimizer.lr=0.1") is None


def test_a_rate_by_hand_replaces_the_configuration_s() -> None:
    chosen = choose({"optimizer": {"lr": 0.1}}, lr=0.25)
    assert chosen is not None
    assert (chosen.lr, chosen.source) == (0.25, "--lr 0.25")


@pytest.mark.parametrize("lr", [0.0, -1.0, float("nan"), float("inf")])
def test_a_rate_that_trains_nothing_is_refused(lr: float) -> None:
    with pytest.raises(ConfigError, match=r"--lr: the learning rate is .* give a positive number"):
        choose({}, lr=lr)


def test_two_rates_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"given twice: --lr 0.5 and an override lr=0.1"):
        choose({}, "lr=0.1", lr=0.5)
    with pytest.raises(ConfigError, match="given twice"):
        choose({}, lr=0.5, lr_from=tmp_path / "file")


@pytest.mark.parametrize(
    ("name", "text", "lr", "rules", "optimizer"),
    [
        ("best.yaml", "lr: 3e-4\nparameterization: {name: mup}\n", 3e-4, {"name": "mup"}, None),
        ("best.json", '{"lr": 0.5, "optimizer": "lion"}', 0.5, None, "lion"),
        ("run.yaml", "optimizer: {lr: 0.5}\nparameterization: {name: sp}\n", 0.5, {"name": "sp"},
         "adam"),
        ("parameterization.json",
         '{"format": 2, "config": {"optimizer": {"lr": 0.25, "optimizer": "lion"},'
         ' "parameterization": {"name": "abs_mup"}}}', 0.25, {"name": "abs_mup"}, "lion"),
    ],
)  # fmt: skip
def test_a_campaign_a_configuration_and_a_record_give_their_rate(
    name: str,
    text: str,
    lr: float,
    rules: dict[str, str] | None,
    optimizer: str | None,
    tmp_path: Path,
) -> None:
    (tmp_path / name).write_text(text)
    found = read_learning_rate(tmp_path / name)
    assert (found.lr, found.parameterization, found.optimizer) == (lr, rules, optimizer)
    assert str(tmp_path / name) in found.source


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read --lr-from"),
        ("[1, 2]", "does not hold a mapping"),
        ("lr: [", "neither YAML nor JSON"),
        ("rate: 3", "holds neither 'lr' nor 'optimizer.lr'"),
        ("lr: fast", "the learning rate is 'fast'"),
        ("lr: true", "the learning rate is True"),
        ("lr: -1", "the learning rate is -1"),
        ("lr: 1\nparameterization: mup", "parameterization must be a mapping"),
        ("lr: !!python/object/apply:os.getcwd []", "neither YAML nor JSON"),
    ],
)
def test_a_file_that_gives_none_is_refused(text: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "best.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_learning_rate(path)


def test_hidden_weights_of_the_absolute_rule_need_128_times_the_rate_of_base_width_128() -> None:
    absolute = wide({"name": "abs_mup"})
    factors = learning_rate_factors(wide(RELATIVE), absolute)
    # Relative alpha * 128 / M and, for ffn_out, alpha * 512 / F; absolute alpha / M and alpha / F.
    assert factors == {
        "embedding": 1.0,
        "query": 128.0,
        "key": 128.0,
        "value": 128.0,
        "attention_out": 128.0,
        "ffn_in": 128.0,
        "ffn_out": 512.0,
        "unembedding": 128.0,
    }


def test_a_rate_of_another_rule_is_told_with_its_factors_and_used_as_it_is() -> None:
    tuned = LearningRate(lr=0.5, source="--lr-from best.yaml", parameterization=RELATIVE)
    text = "\n".join(rule_warnings(wide({"name": "abs_mup"}), tuned))
    assert "tuned under another parameterization (name mup -> abs_mup, " in text
    assert re.search(r"^  ffn_in +128$", text, re.MULTILINE)
    assert re.search(r"^  embedding +1$", text, re.MULTILINE)
    assert "optimizer.lr=64 gives the hidden weights the tuned rate" in text
    assert "no base rate suits all roles" in text


def test_another_base_width_is_another_rule_though_its_name_is_the_same() -> None:
    tuned = LearningRate(
        lr=0.5, source="--lr-from x", parameterization={**RELATIVE, "base_hidden_size": 256}
    )
    text = "\n".join(rule_warnings(wide(RELATIVE), tuned))
    assert "base_hidden_size 256 -> 128" in text
    assert re.search(r"^  ffn_in +2$", text, re.MULTILINE)


def test_the_same_rule_says_nothing() -> None:
    run = wide(RELATIVE)
    # Written out in full, as a checkpoint's record has it, or short.
    for rules in (RELATIVE, config_to_dict(run)["parameterization"]):
        tuned = LearningRate(lr=0.5, source="--lr-from x", parameterization=rules, optimizer="adam")
        assert rule_warnings(run, tuned) == []


def test_other_initial_values_under_the_same_rates_are_told_in_one_line() -> None:
    tuned = LearningRate(
        lr=0.5, source="--lr-from x", parameterization={**RELATIVE, "q_init": "zero"}
    )
    (line,) = rule_warnings(wide(RELATIVE), tuned)
    assert "q_init zero -> scaled" in line
    assert line.endswith("every role's learning rate is the same under both")


def test_another_optimizer_and_an_unknown_rule_are_told() -> None:
    run = tiny()
    (line,) = rule_warnings(
        run,
        LearningRate(lr=1.0, source="--lr-from x", parameterization=TINY["parameterization"],
                     optimizer="lion"),
    )  # fmt: skip
    assert "tuned with optimizer lion, this run uses adam" in line
    (line,) = rule_warnings(run, LearningRate(lr=1.0, source="--lr-from x"))
    assert "does not say under which parameterization" in line
    assert rule_warnings(run, LearningRate(lr=1.0, source="--lr 1")) == []


def test_a_rule_that_the_model_does_not_fit_is_told_as_such(tmp_path: Path) -> None:
    tuned = LearningRate(lr=1.0, source="--lr-from x", parameterization={"name": "mup"})
    (line,) = rule_warnings(tiny(), tuned)
    assert "which has no rule for this model, so nobody can compare" in line
    tuned = LearningRate(lr=1.0, source="--lr-from x", parameterization={"nmae": "mup"})
    (line,) = rule_warnings(tiny(), tuned)
    assert json.dumps("parameterization.name").strip('"') in line
