"""What may differ from the checkpoint's record, and how it is allowed by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_mup.checkpoint.folders import read_record
from megatron_mup.checkpoint.overrides import Change, history_entries, unneeded_names
from megatron_mup.checkpoint.record import check_record, length_warning, make_record
from megatron_mup.errors import CheckpointError, ConfigError
from tests.checkpoint.short_runs import folders, run_training
from tests.configurations import tiny

SAVED = make_record(tiny("train_iters=8"))


def check(*overrides: str, record: dict[str, Any] = SAVED, **data: Any) -> list[Change]:
    """Continue the saved run with other options."""
    run = tiny("train_iters=8", "load=folder", *overrides)
    return check_record(record, run, weights_only=False, **data)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ("lr=0.5", "optimizer.lr"),
        ("weight_decay=0.3", "optimizer.weight_decay"),
        ("adam_eps=1e-5", "optimizer.adam_eps"),
        ("lr_decay_style=cosine", "schedule.lr_decay_style"),
        ("min_lr_ratio=0.1", "schedule.min_lr_ratio"),
        ("weight_decay_mode=constant_product", "optimizer.weight_decay_mode"),
        ("train_iters=20", "training.train_iters"),
        ("lr_decay_iters=20", "schedule.lr_decay_iters"),
        ("global_batch_size=8", "training.global_batch_size"),
    ],
)
def test_a_named_option_may_differ_and_the_refusal_names_it(change: str, name: str) -> None:
    with pytest.raises(CheckpointError) as error:
        check(change)
    allowed = {"training.train_iters"} if name == "schedule.lr_decay_iters" else {name}
    assert any(f"checkpoint.override=[{option}]" in str(error.value) for option in allowed)
    for written in (name, name.split(".")[1]):
        changes = check(change, f"checkpoint.override=[{written}]")
        assert {name} <= {option for item in changes for option in item.options}


def test_an_option_that_was_not_named_is_still_refused() -> None:
    with pytest.raises(CheckpointError, match=r"weight_decay was 0\.0, now 0\.3") as error:
        check("lr=0.5", "weight_decay=0.3", "checkpoint.override=[optimizer.lr]")
    assert "lr was" not in str(error.value)
    assert "checkpoint.override=[optimizer.lr,optimizer.weight_decay]" in str(error.value)


def test_a_named_schedule_does_not_free_the_learning_rates() -> None:
    other = make_record(tiny("train_iters=8"))
    other["table"][0]["lr"] *= 2
    with pytest.raises(CheckpointError, match=r"word_embeddings\.weight: lr was"):
        check("lr_decay_style=cosine", "override=[lr_decay_style]", record=other)


@pytest.mark.parametrize(
    ("change", "name", "words"),
    [
        ("base_hidden_size=16", "base_hidden_size", "base_hidden_size was"),
        ("logit_multiplier=4", "logit_multiplier", "logit multiplier was"),
    ],
)
def test_the_function_differs_under_no_override(change: str, name: str, words: str) -> None:
    tied = ["untie_embeddings_and_output_weights=false", "output_form=multiplier", "init=sigma"]
    record = make_record(tiny("train_iters=8", *tied))
    with pytest.raises(CheckpointError, match="logit multiplier was") as error:
        check(*tied, change, f"override=[{name}]", record=record)
    assert words in str(error.value) or name == "base_hidden_size"
    assert "checkpoint.override=" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("optimizer.learning_rate", r"'optimizer\.learning_rate', which is no option; did you"),
        ("zzz", r"which is no option; see docs"),
        ("model.hidden_size", r"model\.hidden_size, which a resumed run cannot change"),
        ("optimizer.optimizer", r"the saved moments belong to the other optimizer"),
        ("bf16", r"the saved optimizer state has the other precision"),
    ],
)
def test_names_that_no_run_can_change_are_refused(name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check(f"checkpoint.override=[{name}]")


def test_names_that_allow_nothing_are_told() -> None:
    run = tiny("train_iters=8", "load=folder", "lr=0.5", "override=[lr,weight_decay,log_interval]")
    changes = check_record(SAVED, run, weights_only=False)
    assert unneeded_names(run, changes) == ["logging.log_interval", "optimizer.weight_decay"]


def test_other_training_data_is_refused_with_both_hashes() -> None:
    before = {"train_shards": ["aa"], "weights": None, "tokenizers": ["cc"]}
    record = make_record(tiny("train_iters=8"), provenance={"data": before})
    assert check(record=record, data=before) == []
    assert check(record=record, data=None) == []
    other = {"train_shards": ["bb"], "weights": None, "tokenizers": ["dd"]}
    with pytest.raises(CheckpointError) as error:
        check(record=record, data=other)
    for words in (
        "sha256 of the training shards was ['aa'], now ['bb']",
        "sha256 of the tokenizer was ['cc'], now ['dd']",
        "checkpoint.override=[data.train_data_path]",
    ):
        assert words in str(error.value)
    allowed = check("override=[train_data_path]", record=record, data=other)
    assert [change.now for change in allowed] == [["bb"], ["dd"]]


def first_format(bf16: bool) -> dict[str, Any]:
    """A record as 0.1.0 wrote it before there were layouts: bf16 was one of training's options."""
    record = make_record(tiny("train_iters=8", f"bf16={str(bf16).lower()}"))
    config: dict[str, dict[str, Any]] = record["config"]
    for section in ("precision", "recompute", "faults"):
        del config[section]
    for name in ("muon_momentum", "muon_num_ns_steps", "muon_tp_mode"):
        del config["optimizer"][name]
    del config["data"]["max_epochs"], record["provenance"], record["history"]
    config["training"]["bf16"] = bf16
    return {**record, "format": 1}


@pytest.mark.parametrize("bf16", [False, True])
def test_a_record_of_format_1_is_continued_in_its_precision_only(bf16: bool) -> None:
    record = first_format(bf16)
    assert check(f"bf16={str(bf16).lower()}", record=record) == []
    with pytest.raises(CheckpointError, match=rf"precision\.bf16 was {bf16}, now {not bf16}"):
        check(f"bf16={str(not bf16).lower()}", record=record)


def test_sizes_that_are_written_out_are_those_that_follow() -> None:
    record = make_record(tiny())
    same = ["kv_channels=16", "num_query_groups=4", "ffn_hidden_size=256"]
    assert check_record(record, tiny(*same), weights_only=True) == []
    for other in ("num_query_groups=2", "ffn_hidden_size=128"):
        with pytest.raises(CheckpointError, match="shape was"):
            check_record(record, tiny(other), weights_only=True)


def test_a_record_without_its_numbers_is_refused_in_words() -> None:
    record = first_format(False)
    del record["multipliers"], record["decay_iters"]
    for options in ([], ["finetune=true"]):
        run = tiny("train_iters=8", "load=folder", *options)
        with pytest.raises(CheckpointError, match="record lacks multipliers, decay_iters, so"):
            check_record(record, run, weights_only=bool(options))


def test_a_run_of_another_length_is_warned_of_its_data_order() -> None:
    warning = length_warning(SAVED, tiny("train_iters=20"))
    assert warning is not None
    assert "shuffled for 8 iterations, now for 20" in warning
    assert length_warning(SAVED, tiny("train_iters=8")) is None


def test_a_change_is_logged_and_remembered_by_later_checkpoints(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_training(tiny("train_iters=2", "lr_decay_iters=6", *folders(tmp_path)))
    changed = ["lr_decay_iters=6", "lr=0.125", "checkpoint.override=[lr]"]
    result = run_training(tiny("train_iters=4", *changed, *folders(tmp_path, load=True)))
    # The schedule falls linearly from iteration 0 to 6: two thirds of the peak after 2.
    assert result.history[0]["learning-rate"] == pytest.approx(0.125 * 2 / 3)
    assert "checkpoint.override allows: optimizer.lr was 0.015625, now 0.125" in caplog.text
    expected = [{"iteration": 2, "options": ["optimizer.lr"], "was": 0.015625, "now": 0.125}]
    assert read_record(tmp_path / "iter_0000004")["history"] == expected
    # A restart with the same command line finds nothing to allow, and keeps the history.
    run_training(tiny("train_iters=5", *changed, *folders(tmp_path, load=True)))
    assert read_record(tmp_path / "iter_0000005")["history"] == expected
    assert "override names optimizer.lr, which does not differ" in caplog.text


def test_history_is_plain_data() -> None:
    entries = history_entries([Change(("a.b",), 1, [2], "a.b was 1, now [2]")], iteration=7)
    assert entries == [{"iteration": 7, "options": ["a.b"], "was": 1, "now": [2]}]
