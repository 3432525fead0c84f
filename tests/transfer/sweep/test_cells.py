"""From a sweep to its runs: configurations, identities, and what is refused before any run."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_mup.config_io import config_to_dict
from megatron_mup.errors import ConfigError, ParameterizationError
from megatron_mup.transfer.sweep.base import check_base, left_out_of_base, portable_document
from megatron_mup.transfer.sweep.cells import Cell, make_cells
from megatron_mup.transfer.sweep.spec import sweep_from_dict
from tests.transfer.sweep.sweeps import SWEEP, cells_of, sweep_of

_BASE = SWEEP["base"]


def base(**sections: dict[str, Any]) -> dict[str, Any]:
    """The tiny base with options of some sections replaced."""
    merged = {name: dict(values) for name, values in _BASE.items()}
    for name, options in sections.items():
        merged[name] = merged.get(name, {}) | options
    return merged


def one(**changes: Any) -> Cell:
    """The last cell: largest size, highest rate, last seed."""
    return cells_of(**changes)[-1]


def test_every_combination_is_a_cell() -> None:
    cells = cells_of(arms={"a": {}, "b": {"clip_grad": 0.5}}, axes={"weight_decay": [0.0, 0.1]})
    assert len(cells) == len({cell.id for cell in cells}) == 2 * 2 * 2 * 2 * 2
    assert {(cell.arm, cell.run.optimizer.clip_grad) for cell in cells} == {("a", 1.0), ("b", 0.5)}
    last = cells[-1]
    assert (last.settings, last.run.optimizer.weight_decay) == (
        {"optimizer.weight_decay": "0.1"},
        0.1,
    )
    assert (last.run.optimizer.lr, last.run.training.seed) == (2.0**-5, 2)
    assert last.words == "b width 64 lr 2^-5 seed 2 weight_decay=0.1"


def test_width_keeps_head_dim_and_ratios() -> None:
    model = {"num_query_groups": 1, "ffn_hidden_size": 96}
    run = one(base=base(model=model), scale={"axis": "width", "values": [32, 128]}).run
    assert run.model.hidden_size == 128
    assert run.model.num_attention_heads == 8
    assert run.model.head_dim == 16
    assert run.model.num_query_groups == 4
    assert run.model.ffn_hidden_size == 384
    # Unset options stay unset: the FFN is four times as wide by its own rule.
    plain = one(scale={"axis": "width", "values": [32, 128]}).run
    assert (plain.model.ffn_hidden_size, plain.model.num_query_groups) == (None, None)
    narrow = base(
        model={"kv_channels": 8},
        parameterization={"base_kv_channels": 8, "base_num_attention_heads": 2},
    )
    shape = one(base=narrow).run.model
    assert (shape.head_dim, shape.num_attention_heads) == (8, 4)


def test_depth_batch_and_tokens_scale_what_they_say() -> None:
    assert one(scale={"axis": "depth", "values": [1, 3]}).run.model.num_layers == 3
    training = one(scale={"axis": "batch", "values": [4, 8]}).run.training
    # 600 tokens in batches of 8 x 16 positions, rounded up; 100 held out.
    assert (training.global_batch_size, training.micro_batch_size) == (8, 8)
    assert (training.train_iters, training.eval_iters) == (5, 1)
    split = base(training={"global_batch_size": 4, "micro_batch_size": 2})
    assert (
        one(base=split, scale={"axis": "batch", "values": [8]}).run.training.micro_batch_size == 2
    )
    longer = one(tokens=None, scale={"axis": "tokens", "values": [640, 6400]}).run
    assert (longer.training.train_iters, longer.schedule.lr_warmup_iters) == (100, 25)


def test_lengths_follow_from_tokens_and_are_rounded_up() -> None:
    run = one().run
    # 600 / (4 x 16) = 9.4 steps; a quarter of 10 is 2.5, rounded to even; 100 / 64 = 1.6.
    assert (run.training.train_iters, run.schedule.lr_warmup_iters) == (10, 2)
    assert run.training.eval_iters == 2
    short = one(warmup_fraction=0.01).run
    assert short.schedule.lr_warmup_iters == 1
    assert one(warmup_fraction=0).run.schedule.lr_warmup_iters == 0


def test_each_arm_runs_at_the_learning_rates_of_its_grid() -> None:
    rates = {"log2": [-7, -5], "arms": {"sp": {"log2": [-9]}}}
    arms = {"mup": {}, "sp": {"parameterization.name": "sp"}}
    cells = cells_of(arms=arms, learning_rate=rates)
    assert {(cell.arm, cell.run.optimizer.lr) for cell in cells} == {
        ("mup", 2.0**-7),
        ("mup", 2.0**-5),
        ("sp", 2.0**-9),
    }


def test_tokens_per_parameter_count_what_they_say() -> None:
    rule = {"rule": "fixed_tokens_per_parameter", "tokens_per_parameter": 2}
    small, large = (
        cell.run.training.train_iters
        for cell in cells_of(tokens=rule, seeds=[1], learning_rate={"log2": [-5]})
    )
    # Per layer 12 M^2; embedding and unembedding 96 M each. Two tokens a parameter, 64 a step.
    assert small == (2 * (12 * 32**2 + 2 * 96 * 32)) / 64 == 576
    assert large == (2 * (12 * 64**2 + 2 * 96 * 64)) / 64 == 1920
    inner = rule | {"parameters": "non_embedding"}
    assert one(tokens=inner).run.training.train_iters == 2 * 12 * 64**2 / 64 == 1536


def test_the_base_counts_where_the_sweep_says_nothing() -> None:
    own = base(training={"train_iters": 7, "eval_iters": 3}, schedule={"lr_warmup_iters": 4})
    run = one(base=own, tokens=None, warmup_fraction=None, run=None).run
    assert (run.training.train_iters, run.training.eval_iters) == (7, 3)
    assert run.schedule.lr_warmup_iters == 4


def test_a_cell_costs_its_training_and_evaluation() -> None:
    # Of a sequence: 3 x 2 x 16 x (12 x 64^2 + 2 x 16 x 64 + 96 x 64) = 5,505,024; evaluation needs
    # a third of it: 4 x (10 + 2 / 3) sequences.
    assert one().flops == pytest.approx(5_505_024 * 4 * (10 + 2 / 3))


def test_a_cell_is_named_by_its_configuration_without_places() -> None:
    cell = one()
    data = config_to_dict(cell.run)
    del data["checkpoint"], data["logging"], data["training"]["profile_dir"]
    for place in ("train_data_path", "valid_data_path", "data_cache_path"):
        del data["data"][place]
    del data["data"]["per_split_data_args_path"]
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    assert cell.config_sha256 == hashlib.sha256(text.encode()).hexdigest()
    assert cell.id == cell.config_sha256[:12]
    moved = {"train_data_path": ["/elsewhere/train"], "valid_data_path": ["/elsewhere/valid"]}
    logged = base(data=moved, checkpoint={"save": "x"}, logging={"log_interval": 3})
    assert one(base=logged).id == cell.id
    assert one(name="other", arms={"other": {}}).id == cell.id
    assert one(warmup_fraction=0.5).id != cell.id
    assert left_out_of_base(sweep_of(base=logged)) == ["checkpoint.save", "logging.log_interval"]


def test_paths_of_shards_hold_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    blend = base(data={"train_data_path": ["0.3", "a", "0.7", "/b"]})
    assert one(base=blend).run.data.train_data_path == ["0.3", f"{tmp_path}/a", "0.7", "/b"]
    text = sweep_of(base={**_BASE, "data": {}}, text={"vocab_size": 96})
    assert make_cells(text, Path("out/data"))[0].run.data.valid_data_path == [
        f"{tmp_path}/out/data/text_valid"
    ]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scale": {"axis": "width", "values": [32, 40]}}, r"arm base, width 40: .*1.25 times"),
        ({"base": base(model={"typo": 1})}, r"unknown key 'model.typo'"),
        ({"base": base(model={"hidden_size": "wide"})}, r"base.model.hidden_size is wide"),
        ({"arms": {"a": {"optimizer.typo": 1}}}, r"arms.a: unknown option 'optimizer.typo'"),
        ({"arms": {"a": {"lr": 1}}}, r"arms.a sets optimizer.lr, which is set by learning_rate"),
        ({"arms": {"a": {"num_attention_heads": 4}}}, r"set by scale.axis width; remove it"),
        ({"arms": {"a": {"train_iters": 4}}}, r"set by tokens; remove it"),
        ({"arms": {"a": {"checkpoint.load": "x"}}}, r"no run of a sweep: each run starts"),
        (
            {"arms": {"a": {"log_interval": 4}}},
            r"arms.a sets logging.log_interval, which is set by",
        ),
        ({"arms": {"a": {"clip_grad": 1, "optimizer.clip_grad": 2}}}, r"arms.a: .*there twice"),
        ({"axes": {"seed": [1]}}, r"axes sets training.seed, which is set by seeds"),
        (
            {"axes": {"clip_grad": [1]}, "arms": {"a": {"clip_grad": 2}}},
            r"arms.a and axes both set optimizer.clip_grad",
        ),
        ({"arms": {"a": {}, "b": {"clip_grad": 1.0}}}, r"'a width 32 .*' and 'b .* the same run"),
        ({"base": base(checkpoint={"load": "x"})}, r"base: checkpoint.load cannot be set"),
        ({"base": base(training={"rampup_batch_size": [2, 2, 8]})}, r"rampup_batch_size cannot"),
        ({"base": base(faults={"exit_duration_in_mins": 5})}, r"exit_duration_in_mins cannot"),
        ({"text": {"vocab_size": 96}}, r"both 'text' and base.data.train_data_path"),
        ({"base": {**_BASE, "data": {}}}, r"neither 'text' nor base.data.train_data_path"),
        (
            {"base": {**_BASE, "data": {}}, "text": {"vocab_size": 512}},
            r"base.model.vocab_size is 96 and text.vocab_size 512",
        ),
        ({"base": base(parallel={"tensor_model_parallel_size": 2})}, r"split over 2 processes"),
        ({"run": None, "base": base(training={"eval_iters": 0})}, r"eval_iters is 0, and a sweep"),
        ({"tokens": None}, r"arm base, width 32: .*'training.train_iters' is not set"),
    ],
)
def test_what_cannot_run_is_refused_with_all_cells(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        cells_of(**changes)


def test_a_model_without_a_rule_is_refused_with_its_arm() -> None:
    bare = {**_BASE, "parameterization": {}}
    with pytest.raises(ParameterizationError, match=r"^arm base, width 32: "):
        cells_of(base=bare)


OWN = {
    "optimizer.lr": (0.1, "learning_rate"),
    "training.seed": (3, "seeds"),
    "training.train_iters": (7, "tokens"),
    "schedule.lr_warmup_iters": (2, "warmup_fraction"),
    "training.eval_iters": (5, "run.eval_tokens"),
}
"""What a base may not say where the sweep does, and the key that says it."""


@pytest.mark.parametrize("option", OWN)
def test_a_base_that_says_what_the_sweep_sets_is_refused_with_the_reason(option: str) -> None:
    value, key = OWN[option]
    section, name = option.split(".")
    sweep = sweep_of(base=base(**{section: {name: value}}))
    words = f"base sets {option}, but in each run it is set by {key}; remove it from the base"
    with pytest.raises(ConfigError, match=words):
        check_base(sweep)
    # A configuration in a file has them all, and is said what is not used.
    check_base(replace(sweep, base_file=Path("run.yaml")))


def test_what_the_sweep_leaves_to_the_base_may_stand_there() -> None:
    free = base(
        training={"train_iters": 7, "eval_iters": 3}, schedule={"lr_warmup_iters": 4}, optimizer={}
    )
    check_base(sweep_of(base=free, tokens=None, warmup_fraction=None, run=None))


def test_a_folders_yaml_holds_nothing_that_the_sweep_does_not_use() -> None:
    full = base(
        optimizer={"lr": 0.1, "weight_decay": 0.5}, checkpoint={"save": "x"}, training={"seed": 3}
    )
    sweep = replace(sweep_of(base=full), base_file=Path("run.yaml"))
    document = portable_document(sweep)
    assert (document["base"]["optimizer"], document["base"]["checkpoint"]) == (
        {"weight_decay": 0.5},
        {},
    )
    kept = sweep_from_dict(document, origin="kept")
    check_base(kept)
    ids = [[cell.id for cell in make_cells(each, Path("data"))] for each in (sweep, kept)]
    assert ids[0] == ids[1]
