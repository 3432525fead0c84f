"""The sweep's YAML: what is read, and that everything else is refused by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_mup.errors import ConfigError
from megatron_mup.transfer.sweep.spec import load_sweep, sweep_from_dict
from tests.transfer.sweep.sweeps import sweep_data, sweep_of


def test_a_whole_yaml_is_read(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("model: {num_layers: 3}\n")
    text = """
        name: mup_vs_sp
        base: base.yaml
        scale: {axis: depth, values: [1, 2, 4]}
        learning_rate: {log2_min: -4, log2_max: -2.5, step: 0.5}
        seeds: [3, 1]
        seeds_within_octaves: 2
        tokens: {rule: fixed_tokens_per_parameter, tokens_per_parameter: 20,
                 parameters: non_embedding}
        warmup_fraction: 1e-1
        arms: {mup: {parameterization.name: mup}, plain: }
        axes: {optimizer.weight_decay: [0, 0.1]}
        text: {vocab_size: 512, valid_tokens: 250_000}
        run: {eval_tokens: 2_000, checkpoint_fraction: 0.25, keep_checkpoints: true}
    """
    (tmp_path / "s.yaml").write_text(text)
    sweep = load_sweep(tmp_path / "s.yaml")
    assert sweep.base == {"model": {"num_layers": 3}}
    assert (sweep.axis, sweep.sizes) == ("depth", (1.0, 2.0, 4.0))
    assert sweep.log2_lrs == dict.fromkeys(("mup", "plain"), (-4.0, -3.5, -3.0, -2.5))
    assert (sweep.seeds, sweep.seeds_within_octaves) == ((3, 1), 2.0)
    assert sweep.tokens is not None
    assert (sweep.tokens.rule, sweep.tokens.amount, sweep.tokens.parameters) == (
        "fixed_tokens_per_parameter",
        20.0,
        "non_embedding",
    )
    assert sweep.warmup_fraction == 0.1
    assert sweep.arms == {"mup": {"parameterization.name": "mup"}, "plain": {}}
    assert sweep.axes == {"optimizer.weight_decay": (0, 0.1)}
    assert sweep.text is not None
    assert (sweep.text.vocab_size, sweep.text.valid_tokens, sweep.text.corpus_bytes) == (
        512,
        250_000,
        6_000_000,
    )
    assert (sweep.eval_tokens, sweep.checkpoint_fraction, sweep.keep_checkpoints) == (
        2000,
        0.25,
        True,
    )
    # The copy that a sweep's folder keeps needs no second file.
    copy = sweep_from_dict(yaml.safe_load(yaml.safe_dump(dict(sweep.document))), origin="copy")
    assert sweep.base_file == tmp_path / "base.yaml"
    assert copy == replace(sweep, base_file=None)


def test_an_arm_may_have_a_grid_of_its_own() -> None:
    arms = {"mup": {}, "sp": {"parameterization.name": "sp"}}
    own = {"sp": {"log2_min": -11, "log2_max": -10, "step": 0.5}}
    sweep = sweep_of(arms=arms, learning_rate={"log2": [-7, -5], "arms": own})
    assert sweep.log2_lrs == {"mup": (-7.0, -5.0), "sp": (-11.0, -10.5, -10.0)}
    with pytest.raises(ConfigError, match=r"unknown key 'learning_rate.arms.spp'; known are mup"):
        sweep_of(arms=arms, learning_rate={"log2": [-7], "arms": {"spp": {"log2": [-5]}}})
    with pytest.raises(ConfigError, match=r"learning_rate.log2_min is missing"):
        sweep_of(arms=arms, learning_rate={"arms": own})


def test_a_grid_of_eighths_between_1_and_2_is_one() -> None:
    sweep = sweep_of(learning_rate={"log2_min": 0.125, "log2_max": 0.875, "step": 0.375})
    assert sweep.log2_lrs == {"base": (0.125, 0.5, 0.875)}


def test_what_is_left_out_has_defaults() -> None:
    sweep = sweep_of(seeds=None, tokens=None, warmup_fraction=None, run=None)
    assert (sweep.seeds, sweep.seeds_within_octaves) == ((1,), None)
    assert (sweep.tokens, sweep.warmup_fraction, sweep.text) == (None, None, None)
    assert sweep.arms == {"base": {}}
    assert (sweep.eval_tokens, sweep.checkpoint_fraction, sweep.keep_checkpoints) == (
        None,
        None,
        False,
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"widths": [1]}, r"unknown key 'widths'; known are name, base, scale, learning_rate"),
        ({"name": None}, r"s.yaml: name is missing; known here are name, base"),
        ({"name": "a/b"}, r"name holds the name 'a/b'; use letters"),
        ({"scale": {"axis": "heads", "values": [1]}}, r"scale.axis is 'heads'; use one of width"),
        ({"scale": {"axis": "width"}}, r"scale.values is missing; known here are axis, values"),
        ({"scale": {"axis": "width", "sizes": [1]}}, r"unknown key 'scale.sizes'; known are axis"),
        ({"scale": {"axis": "width", "values": [64, 32]}}, r"each number once, the smallest first"),
        ({"scale": {"axis": "width", "values": [0, 32]}}, r"scale.values holds 0; sizes"),
        ({"scale": {"axis": "width", "values": [32.5]}}, r"scale.values is \[32.5\]; give whole"),
        ({"scale": 3}, r"scale must be a mapping of axis, values; it is 3"),
        ({"learning_rate": {}}, r"learning_rate.log2_min is missing"),
        ({"learning_rate": {"log2": []}}, r"learning_rate.log2 is \[\]; give a list of numbers"),
        ({"learning_rate": {"log2": [-5, "fast"]}}, r"log2 is 'fast'; give a finite number"),
        ({"learning_rate": {"log2": [-5, True]}}, r"log2 is True; give a finite number"),
        ({"learning_rate": {"log2": [-5], "step": 1}}, r"given together with log2_min"),
        (
            {"learning_rate": [0.001, 0.01]},
            r"learning_rate is \[0.001, 0.01\]; give log2 of .* 0.001 is -9.97",
        ),
        (
            # log2(0.001) = -9.966, log2(0.01) = -6.644.
            {"learning_rate": {"log2": [0.001, 0.01]}},
            r"log2 gives 0.001, 0.01, which look like .* give log2: \[-9.966, -6.644\]",
        ),
        (
            {"learning_rate": {"log2_min": 0.001, "log2_max": 0.003, "step": 0.002}},
            r"learning_rate.log2_min gives 0.001, 0.003, which look like learning rates",
        ),
        (
            {"learning_rate": {"log2_min": 0.001, "log2_max": 0.016, "step": 1}},
            r"log2_min gives 0.001, 0.016, which look like .* give log2: \[-9.966, -5.966\]",
        ),
        ({"learning_rate": {"log2": [-5, 2000]}}, r"log2 gives the learning rate 2\^2000; give"),
        (
            {"learning_rate": {"log2_min": -101, "log2_max": -3, "step": 1}},
            r"log2_min gives the learning rate 2\^-101; give log2 .* from -100 to 100",
        ),
        (
            {"learning_rate": {"log2_min": -5, "log2_max": -3, "step": 0.75}},
            r"step 0.75 does not lead from log2_min -5 to log2_max -3",
        ),
        (
            {"learning_rate": {"log2_min": -5, "log2_max": -3, "step": 0}},
            r"learning_rate.step is 0; it must be above 0",
        ),
        ({"seeds": [1, 1]}, r"seeds is \[1, 1\]; give each number once"),
        ({"seeds": [-1]}, r"seeds is \[-1\]; give whole numbers, not negative"),
        ({"seeds_within_octaves": -1}, r"seeds_within_octaves is -1; it must be at least 0"),
        ({"tokens": {"rule": "chinchilla"}}, r"tokens.rule is 'chinchilla'; use one of fixed"),
        ({"tokens": {"rule": "fixed_tokens"}}, r"tokens.tokens is missing"),
        (
            {"tokens": {"rule": "fixed_tokens", "tokens_per_parameter": 20}},
            r"tokens_per_parameter does not belong to rule fixed_tokens, which takes tokens",
        ),
        (
            {"tokens": {"rule": "fixed_tokens", "tokens": 9, "parameters": "total"}},
            r"tokens.parameters does not belong to rule fixed_tokens",
        ),
        ({"scale": {"axis": "tokens", "values": [9]}}, r"tokens is given, but scale.axis tokens"),
        ({"warmup_fraction": 1.5}, r"warmup_fraction is 1.5; it must be at least 0 and at most 1"),
        ({"arms": {}}, r"arms is empty"),
        ({"arms": {"a": 3}}, r"arms.a is 3; give a mapping of options"),
        ({"axes": {"weight_decay": 0.1}}, r"axes.weight_decay is 0.1; give a list of values"),
        ({"text": {}}, r"text.vocab_size is missing"),
        ({"text": {"vocab_size": 1.5}}, r"text.vocab_size is 1.5; give a positive whole number"),
        ({"run": {"threads": 2}}, r"unknown key 'run.threads'; known are eval_tokens, checkpoint"),
        ({"run": {"checkpoint_fraction": 0}}, r"checkpoint_fraction is 0; it must be above 0"),
        ({"run": {"keep_checkpoints": "yes"}}, r"keep_checkpoints is 'yes'; use true or false"),
    ],
)
def test_a_mistake_is_refused_by_its_key(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        sweep_from_dict(sweep_data(**change), origin="s.yaml")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: a\nname: b\n", "the key 'name' is there twice"),
        ("name: [", "is not valid YAML"),
        ("3", "the top level must be a mapping of name, base"),
        ("name: !!python/object:os.system {}", "is not valid YAML"),
        ("{name: a, base: absent.yaml}", r"cannot read configuration '.*absent.yaml'"),
    ],
)
def test_a_file_that_is_no_sweep_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_sweep(path)
    with pytest.raises(ConfigError, match="cannot read the sweep"):
        load_sweep(tmp_path / "none.yaml")


def test_refine_is_read_with_defaults_and_refused_by_name() -> None:
    refine = sweep_of(refine={}).refine
    assert refine is not None
    assert (refine.interval_octaves, refine.max_rounds) == (0.5, 3)
    assert (refine.max_cells, refine.widest) == (None, (-14.0, 2.0))
    given = {"interval_octaves": 1, "max_rounds": 5, "max_cells": 9, "widest": [-10, -2]}
    refine = sweep_of(refine=given).refine
    assert refine is not None
    assert (refine.interval_octaves, refine.max_rounds) == (1.0, 5)
    assert (refine.max_cells, refine.widest) == (9, (-10.0, -2.0))
    for wrong in ({"widest": [1]}, {"widest": [2, 1]}, {"max_rounds": 0}, {"octaves": 1}):
        with pytest.raises(ConfigError, match=r"refine\."):
            sweep_of(refine=wrong)
