"""What a target may differ in: sizes, layout, precision, length; and what is warned of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_mup.config_io import config_from_dict
from megatron_mup.transfer.campaign.likeness import (
    COMPARED,
    differences,
    extrapolations,
    warnings,
)
from megatron_mup.transfer.sweep.spec import Counted, TokenBudget, TokenRule
from tests.transfer.campaign.campaigns import campaign_of, target_data

FIXED = TokenBudget(rule=TokenRule.FIXED_TOKENS, amount=600)


def compare(tmp_path: Path, **changes: Any) -> tuple[list[str], list[str]]:
    """Differences and warnings of the largest proxy and a changed target."""
    proxy = campaign_of(tmp_path).proxies(tmp_path)[-1].run
    target = config_from_dict({"optimizer": {"lr": 1.0}} | target_data(**changes))
    return differences(proxy, target), warnings(proxy, target, budget=FIXED)


def test_a_target_that_is_only_wider_differs_in_nothing(tmp_path: Path) -> None:
    assert compare(tmp_path) == ([], [])


@pytest.mark.parametrize(
    "changes",
    [
        {"parallel__tensor_model_parallel_size": 2},
        {"training__micro_batch_size": 1, "training__eval_iters": 7},
        {"training__seed": 99},
        {"precision__deterministic_mode": True},
        {"checkpoint__save": "runs/x"},
        {"logging__log_interval": 3},
        {"faults__max_skipped_steps": 3},
    ],
)
def test_layout_places_and_seeds_are_free(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert compare(tmp_path, **changes) == ([], [])


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"parameterization__name": "sp"}, "parameterization.name mup -> sp"),
        ({"parameterization__base_hidden_size": 64}, "parameterization.base_hidden_size 32 -> 64"),
        ({"parameterization__q_init": "zero"}, "parameterization.q_init scaled -> zero"),
        (
            {"parameterization__embedding_multiplier": 2.0},
            "parameterization.embedding_multiplier 1.0 -> 2.0",
        ),
        (
            {"optimizer__optimizer": "lion", "optimizer__lr": 1.0},
            "optimizer.optimizer adam -> lion",
        ),
        (
            {"optimizer__weight_decay_mode": "coupled", "optimizer__lr": 1.0},
            "optimizer.weight_decay_mode independent -> coupled",
        ),
        ({"optimizer__clip_grad": 0.5, "optimizer__lr": 1.0}, "optimizer.clip_grad 1.0 -> 0.5"),
        ({"schedule__lr_decay_style": "cosine"}, "schedule.lr_decay_style linear -> cosine"),
        ({"schedule__min_lr_ratio": 0.1}, "schedule.min_lr_ratio 0.0 -> 0.1"),
        ({"model__activation": "swiglu"}, "model.activation gelu -> swiglu"),
        ({"data__eod_mask_loss": True}, "data.eod_mask_loss False -> True"),
    ],
)
def test_anything_else_is_told(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    assert compare(tmp_path, **changes)[0] == [told]


@pytest.mark.parametrize(
    ("iters", "warmup", "told"),
    [
        (1000, 200, []),
        # 20% of 10 iterations are known to one iteration of each run only.
        (1000, 300, []),
        (1000, 320, ["schedule.lr_warmup_iters 2 of 10 iterations (20.0%) -> 320 of 1000 (32.0%)"]),
        (1000, 0, ["schedule.lr_warmup_iters 2 of 10 iterations (20.0%) -> 0 of 1000 (0.0%)"]),
    ],
)
def test_warmup_is_compared_as_a_part_of_the_run(
    tmp_path: Path, iters: int, warmup: int, told: list[str]
) -> None:
    changes = {"training__train_iters": iters, "schedule__lr_warmup_iters": warmup}
    found, warned = compare(tmp_path, **changes)
    assert found == told
    assert warned == [
        "the target trains on 64,000 tokens, 100 times more than the 640 of the sweep's rule of "
        "tokens: the best learning rate falls with the length of a run (arXiv:2409.19913), and the "
        "prediction does not correct for it"
    ]


def test_tokens_are_compared_with_the_sweeps_rule_at_the_targets_size(tmp_path: Path) -> None:
    proxy = campaign_of(tmp_path).proxies(tmp_path)[-1].run
    rule = TokenBudget(
        rule=TokenRule.FIXED_TOKENS_PER_PARAMETER, amount=0.01, parameters=Counted.NON_EMBEDDING
    )
    # 12 x 512^2 in matrices, 4,608 in biases and 3 x 1,024 in norms: 31,534 tokens, 493 steps.
    length = {"training__train_iters": 493, "schedule__lr_warmup_iters": 99}
    target = config_from_dict({"optimizer": {"lr": 1.0}} | target_data(**length))
    assert warnings(proxy, target, budget=rule) == []
    # A third more than the rule gives is said, and needs no leave.
    longer = target_data(training__train_iters=657, schedule__lr_warmup_iters=131)
    target = config_from_dict({"optimizer": {"lr": 1.0}} | longer)
    (one,) = extrapolations(proxy, target, budget=rule)
    assert (one.kind, one.stops) == ("tokens", False)
    # Without a rule every run has the base's length.
    (one,) = extrapolations(proxy, target, budget=None)
    assert one.stops
    assert "than the 640 of runs as long as the proxies'" in one.why


def test_a_ramp_up_counts_in_the_tokens(tmp_path: Path) -> None:
    # Two steps of 2, two of 3 and 21 of 4 sequences of 16: 94 x 16 instead of 100 x 16.
    ramped = {"training__train_iters": 25, "training__rampup_batch_size": [2, 1, 8]}
    told = compare(tmp_path, **ramped, schedule__lr_warmup_iters=5)[1]
    assert told[0].startswith("the target trains on 1,504 tokens, 2.35 times more than the 640")
    assert told[1].startswith("training.rampup_batch_size is [2, 1, 8] in the target and None")


def test_a_token_rule_of_the_parameterization_is_named(tmp_path: Path) -> None:
    changes = {"training__train_iters": 1000, "schedule__lr_warmup_iters": 200}
    rule = {"horizon_rule": "token_power", "base_train_tokens": 640}
    proxy = campaign_of(tmp_path).proxies(tmp_path)[-1].run
    data = target_data(**changes)
    data["parameterization"] |= rule
    target = config_from_dict({"optimizer": {"lr": 1.0}} | data)
    (told,) = warnings(proxy, target, budget=FIXED)
    assert told.endswith("only parameterization.horizon_rule=token_power corrects for it")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"model__vocab_size": 50304},
            "model.vocab_size is 50304 in the target and 96 in the largest proxy, and the sweep "
            "has not varied it",
        ),
        (
            {"data__train_data_path": ["other/train"]},
            "the target reads other training shards than the proxies",
        ),
        ({"precision__bf16": True}, "the target computes in bf16, the proxies in fp32"),
    ],
)
def test_vocabulary_data_and_precision_are_warned_of(
    tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    proxy = campaign_of(tmp_path).proxies(tmp_path)[-1].run
    target = config_from_dict({"optimizer": {"lr": 1.0}} | target_data(**changes))
    (one,) = extrapolations(proxy, target, budget=FIXED)
    assert (one.why, one.stops) == (told, False)


def test_warmup_is_known_to_one_iteration_of_the_target_too(tmp_path: Path) -> None:
    # 4 of 11 are 16.4% more than 2 of 10: less than the 10% and 9.1% of an iteration of each.
    near = {"training__train_iters": 11, "schedule__lr_warmup_iters": 4}
    assert compare(tmp_path, **near)[0] == []
    assert len(compare(tmp_path, **(near | {"schedule__lr_warmup_iters": 5}))[0]) == 1


def test_the_end_of_the_decay_is_compared_with_the_runs_end(tmp_path: Path) -> None:
    assert compare(tmp_path, schedule__lr_decay_iters=10) == ([], [])
    assert compare(tmp_path, schedule__lr_decay_iters=5)[0] == [
        "schedule.lr_decay_iters 10 of 10 iterations (100.0%) -> 5 of 10 (50.0%)"
    ]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"model__num_layers": 4},
            "model.num_layers is 4 in the target and 1 in the largest proxy",
        ),
        (
            {"model__num_attention_heads": 8},
            "the head dim is 64 in the target and 16 in the largest proxy",
        ),
        (
            {"model__ffn_hidden_size": 1024},
            "the ratio of FFN to hidden size is 2 in the target and 4 in the largest proxy",
        ),
        (
            {"model__num_query_groups": 8},
            "the number of heads a query group is 4 in the target and 1 in the largest proxy",
        ),
    ],
)
def test_sizes_that_no_proxy_varied_are_warned_of(
    tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    assert compare(tmp_path, **changes) == ([], [f"{told}, and the sweep has not varied it"])


def test_a_larger_batch_is_told_with_its_tokens(tmp_path: Path) -> None:
    warned = compare(tmp_path, training__global_batch_size=8)[1]
    assert warned[0].startswith("the target trains on 1,280 tokens, 2 times more than the 640 of ")
    assert warned[1].startswith("the batch in tokens is 128 in the target and 64 in the largest")


def test_every_option_that_may_differ_is_an_option(tmp_path: Path) -> None:
    run = campaign_of(tmp_path).target
    for section, free in COMPARED.items():
        for option in free:
            assert hasattr(getattr(run, section), option)
