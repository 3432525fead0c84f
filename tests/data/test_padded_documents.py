"""One document a sequence: exact samples, the shuffle, and training on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_mup import platform
from megatron_mup.config import LossDenominator, RunConfig
from megatron_mup.data.checks import check_epochs, check_training_data
from megatron_mup.data.datasets import build_datasets
from megatron_mup.data.padded_documents import PaddedDocuments, shuffled
from megatron_mup.errors import ConfigError, DataError
from megatron_mup.training.loop import TrainResult, train
from megatron_mup.training.step import loss_function
from tests.checkpoint.short_runs import folders, losses
from tests.configurations import tiny
from tests.data.test_datasets import write_shard

EOD, BOS = 2, 1


def write_documents(prefix: Path, documents: list[list[list[int]]]) -> str:
    """A shard whose documents are lists of sequences, as megatron-core writes it."""
    platform.prepare()
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for sequences in documents:
        for sequence in sequences:
            builder.add_item(torch.tensor(sequence, dtype=torch.int32))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def documents_of(*prefixes: str, length: int = 6, seed: int = 5) -> PaddedDocuments:
    return PaddedDocuments(prefixes, seq_length=length, eod=EOD, bos=BOS, seed=seed, samples=10**6)


def sample_of(document: list[list[int]], tmp_path: Path) -> dict[str, list[float]]:
    """The only sample of a shard with one document, at sequence length 6."""
    samples = documents_of(write_documents(tmp_path / "one", [document, [[9] * 9]]))
    order = [shuffled(number, 2, key="5/0") for number in range(2)]
    found = samples[order.index(0)]
    assert found["position_ids"].tolist() == [0, 1, 2, 3, 4, 5]
    assert found["tokens"].dtype == found["labels"].dtype == torch.int64
    return {name: found[name].tolist() for name in ("tokens", "labels", "loss_mask")}


@pytest.mark.parametrize(
    ("document", "tokens", "labels", "mask"),
    [
        # Short: its end is the last target, the rest is padding without loss.
        ([[7, 8, EOD]], [1, 7, 8, 2, 2, 2], [7, 8, 2, 2, 2, 2], [1, 1, 1, 0, 0, 0]),
        # As long as the sequence, its end included.
        ([[3, 4, 5, 6, 7, EOD]], [1, 3, 4, 5, 6, 7], [3, 4, 5, 6, 7, 2], [1] * 6),
        # Longer: cut, and never ended.
        ([[3, 4, 5, 6, 7, 8, 9, EOD]], [1, 3, 4, 5, 6, 7], [3, 4, 5, 6, 7, 8], [1] * 6),
        # An end inside: what follows carries no loss but is read.
        ([[3, EOD, 5, 6]], [1, 3, 2, 5, 6, 2], [3, 2, 5, 6, 2, 2], [1, 1, 0, 0, 0, 0]),
        # No end of its own: the first padding token is a target.
        ([[3, 4]], [1, 3, 4, 2, 2, 2], [3, 4, 2, 2, 2, 2], [1, 1, 1, 0, 0, 0]),
        # Nothing in it, with and without a sequence.
        ([[]], [1, 2, 2, 2, 2, 2], [2] * 6, [1, 0, 0, 0, 0, 0]),
        ([], [1, 2, 2, 2, 2, 2], [2] * 6, [1, 0, 0, 0, 0, 0]),
        # Several sequences follow each other; the third is cut.
        ([[3, 4], [], [5, 6, 7], [8, EOD]], [1, 3, 4, 5, 6, 7], [3, 4, 5, 6, 7, 8], [1] * 6),
        ([[3], [EOD]], [1, 3, 2, 2, 2, 2], [3, 2, 2, 2, 2, 2], [1, 1, 0, 0, 0, 0]),
    ],
)
def test_a_sample_is_the_document_behind_a_begin_token(
    document: list[list[int]],
    tokens: list[int],
    labels: list[int],
    mask: list[int],
    tmp_path: Path,
) -> None:
    assert sample_of(document, tmp_path) == {"tokens": tokens, "labels": labels, "loss_mask": mask}


def firsts(samples: PaddedDocuments, start: int, stop: int) -> list[int]:
    """First target of each of these samples."""
    return [int(samples[index]["labels"][0]) for index in range(start, stop)]


def test_each_epoch_reads_every_document_of_all_shards_once(tmp_path: Path) -> None:
    # Eleven documents that begin with 10, ..., 20.
    sizes = {"a": range(10, 13), "b": range(13, 14), "c": range(14, 21)}
    prefixes = [
        write_shard(tmp_path / name, [[first, 3, EOD] for first in documents])
        for name, documents in sizes.items()
    ]
    samples = documents_of(*prefixes)
    epochs = [firsts(samples, 11 * epoch, 11 * epoch + 11) for epoch in range(4)]
    assert all(sorted(epoch) == list(range(10, 21)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    # Whatever their shards, and whichever sample is asked for first.
    whole = write_shard(tmp_path / "whole", [[first, 3, EOD] for first in range(10, 21)])
    assert firsts(documents_of(whole), 11, 22) == epochs[1]
    assert firsts(documents_of(whole, seed=6), 0, 11) != epochs[0]
    assert firsts(documents_of(whole), 30, 33) == (epochs[2] + epochs[3])[8:11]


@pytest.mark.parametrize("sizes", [range(1, 101), range(101, 201)])
def test_the_shuffle_is_a_bijection_at_every_size(sizes: range) -> None:
    for size in sizes:
        order = [shuffled(index, size, key="1234/0") for index in range(size)]
        assert sorted(order) == list(range(size))


@pytest.mark.parametrize("size", [4095, 4096, 4097, 10_007])
def test_the_shuffle_is_a_bijection_at_large_sizes(size: int) -> None:
    assert len({shuffled(index, size, key="s") for index in range(size)}) == size


def test_the_shuffle_of_a_corpus_too_large_to_list_stays_inside_and_spreads() -> None:
    size = 365_000_000
    places = [shuffled(index, size, key="1234/0") for index in range(2000)]
    assert len(set(places)) == 2000
    assert 0 <= min(places) < max(places) < size
    # Mean of uniform numbers: half, give or take 4 standard errors of size / sqrt(12 * 2000).
    assert abs(sum(places) / 2000 / size - 0.5) < 4 / (12 * 2000) ** 0.5


def test_the_shuffle_differs_by_epoch_and_seed_and_leaves_few_in_place() -> None:
    orders = [
        [shuffled(index, 1000, key=key) for index in range(1000)]
        for key in ("1/0", "1/1", "2/0", "11/0")
    ]
    identity = list(range(1000))
    for number, order in enumerate(orders):
        for other in (identity, *orders[:number]):
            # Two independent orders agree in one place on average.
            assert sum(a == b for a, b in zip(order, other, strict=True)) < 10


def documents_run(path: Path, *overrides: str) -> RunConfig:
    """A run on 30 short documents of 3 to 10 tokens in two shards."""
    documents = [[3 + number % 90] * (2 + number % 8) + [EOD] for number in range(30)]
    if not (path / "a.bin").exists():
        write_shard(path / "a", documents[:11])
        write_shard(path / "b", documents[11:])
    layout = ("sample_layout=document", f"train_data_path=[{path / 'a'},{path / 'b'}]")
    return tiny(*layout, "lr_decay_iters=20", *overrides)


def trained(run: RunConfig) -> TrainResult:
    return train(run, echo=lambda _line: None)


def test_a_run_on_documents_resumed_in_the_middle_equals_the_whole_one(tmp_path: Path) -> None:
    # 20 batches of 4 from 30 documents: the resume lies inside the second epoch.
    data, saved = tmp_path / "data", tmp_path / "saved"
    options = ("loss_denominator=positions", "data.bos_token=1")
    whole = trained(documents_run(data, *options, "train_iters=20"))
    first = trained(documents_run(data, *options, "train_iters=9", *folders(saved)))
    second = trained(documents_run(data, *options, "train_iters=20", *folders(saved, load=True)))
    assert losses(first) + losses(second) == losses(whole)
    assert (len(losses(first)), len(losses(second))) == (9, 11)


def test_a_log_line_tells_what_part_of_the_positions_was_trained_on(tmp_path: Path) -> None:
    # An epoch of 30 documents in 3 batches of 10: 2 + i mod 8 tokens and an end each, 6.4 a
    # document by counting: 4 * (3 + ... + 10) - 9 - 10 = 189 tokens of 30 * 16 positions.
    options = ("global_batch_size=10", "micro_batch_size=5", "train_iters=3", "log_interval=3")
    (row,) = [
        row
        for row in trained(documents_run(tmp_path, *options, "lr_decay_iters=3")).history
        if "lm loss" in row
    ]
    assert row["unmasked-fraction"] == pytest.approx(189 / 480)
    assert row["consumed-tokens"] == 480


@pytest.mark.parametrize(("denominator", "count"), [("tokens", 3), ("positions", 8)])
def test_the_loss_is_divided_by_tokens_or_by_positions(denominator: str, count: int) -> None:
    mask = torch.tensor([[1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    values = torch.tensor([[2.0, 3.0, 50.0, 50.0], [5.0, 50.0, 50.0, 50.0]])
    total, divisor, report = loss_function(mask, LossDenominator(denominator), values)
    assert (total.item(), divisor.item()) == (10.0, count)
    # What is reported is per unmasked token in both cases.
    assert report["lm loss"].tolist() == [10.0, 3.0]


def test_gradients_of_the_two_denominators_differ_by_the_unmasked_fraction(tmp_path: Path) -> None:
    norms = {}
    for denominator in ("tokens", "positions"):
        options = (f"loss_denominator={denominator}", "train_iters=1", "lr_decay_iters=1")
        result = trained(documents_run(tmp_path, *options, "log_interval=1"))
        (row,) = [row for row in result.history if "lm loss" in row]
        norms[denominator] = row["grad-norm"]
    assert norms["positions"] / norms["tokens"] == pytest.approx(row["unmasked-fraction"])


def test_epochs_count_documents(tmp_path: Path) -> None:
    run = documents_run(tmp_path, "max_epochs=2.5")
    assert set(check_epochs(run, 75).values()) == {2.5}
    with pytest.raises(DataError, match=r"2\.53 times, data\.max_epochs is 2\.5"):
        check_epochs(run, 76)


@pytest.mark.parametrize("which", ["train", "valid"])
def test_weights_are_refused_before_any_work(which: str, tmp_path: Path) -> None:
    weighted = f"{which}_data_path=[0.3,{tmp_path / 'a'},0.7,{tmp_path / 'b'}]"
    others = () if which == "train" else ("eval_iters=1",)
    run = documents_run(tmp_path, weighted, *others)
    with pytest.raises(DataError, match="give the prefixes alone, or use sample_layout=packed"):
        check_training_data(run)


def test_held_out_documents_come_from_their_own_shard(tmp_path: Path) -> None:
    valid = write_shard(tmp_path / "valid", [[95, EOD]] * 3)
    run = documents_run(tmp_path, f"valid_data_path=[{valid}]")
    train_set, valid_set = build_datasets(run, train_samples=30, valid_samples=2)
    assert valid_set is not None
    assert (len(train_set), len(valid_set)) == (30, 2)
    assert valid_set[0]["labels"][:2].tolist() == [95, EOD]
    # Without a begin token of its own, the end of document stands there.
    assert int(valid_set[0]["tokens"][0]) == EOD
    assert 95 not in {int(train_set[index]["labels"][0]) for index in range(30)}


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("data.bos_token=96", "data.bos_token is 96"),
        ("data.eod_token=200", "data.eod_token is 200"),
    ],
)
def test_a_special_token_outside_of_the_vocabulary_is_refused(
    option: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        check_training_data(documents_run(tmp_path, option))
    check_training_data(documents_run(tmp_path, "data.bos_token=95"))


def test_documents_shorter_than_a_sequence_are_data_enough(tmp_path: Path) -> None:
    prefix = write_shard(tmp_path / "short", [[5, EOD]])
    check_training_data(tiny(f"train_data_path=[{prefix}]", "sample_layout=document"))
    with pytest.raises(DataError, match="which is not one sequence"):
        check_training_data(tiny(f"train_data_path=[{prefix}]"))


def test_shards_without_a_document_are_refused() -> None:
    with pytest.raises(DataError, match="hold no document"):
        documents_of()


@pytest.mark.parametrize(
    ("options", "cure"),
    [
        (("data.bos_token=1",), "only sample_layout=document has a begin token"),
        (("data.bos_token=-1", "sample_layout=document"), "must not be negative"),
        (("eod_mask_loss=true", "sample_layout=document"), "leave it at false"),
    ],
)
def test_options_that_contradict_the_layout_are_refused(
    options: tuple[str, ...], cure: str
) -> None:
    with pytest.raises(ConfigError, match=cure):
        tiny(*options)
