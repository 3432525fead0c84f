"""Flags of Megatron-LM's script: taken out of a command line, or refused with what to do."""

from __future__ import annotations

import pytest

from megatron_mup.data.megatron_flags import own_arguments
from megatron_mup.errors import DataError


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--input a.jsonl b.jsonl --workers 2", "--input a.jsonl b.jsonl --workers 2"),
        ("--dataset-impl mmap --input a", "--input a"),
        ("--dataset-impl=mmap --input a", "--input a"),
        ("--partitions 2 --keep-sequential-samples --chunk-size 1 a", "a"),
        ("--vocab-size 50257 --padded-vocab-size=50304 a", "a"),
        ("--make-vocab-size-divisible-by 128 a", "a"),
        ("--lang english --keep-newlines --legacy-tokenizer --trust-remote-code a", "a"),
        ("--json-keys text --append-eod a", "--json-key text --append-eod a"),
        ("--json-keys=text a", "--json-key text a"),
        ("--json-keys text - ", "--json-key text -"),
        # Ours takes one key, and files may follow it.
        ("--json-key text a", "--json-key text a"),
        ("--json-key=text a", "--json-key=text a"),
        ("-- --lang", "-- --lang"),
    ],
)
def test_flags_that_change_nothing_are_taken_out(arguments: str, expected: str) -> None:
    assert own_arguments(arguments.split()) == expected.split()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--split-sentences", "--split-sentences is for BERT and is not offered"),
        ("--vocab-file v.json", "--vocab-file is not read; pass a tokenizer.json"),
        ("--merge-file=m.txt", "--merge-file is not read; pass a tokenizer.json"),
        ("--tiktoken-pattern v2", "--tiktoken-pattern is not read; pass a tokenizer.json"),
        ("--vocab-extra-ids 100", "--vocab-extra-ids adds the mask tokens of T5"),
        ("--dataset-impl lazy", "--dataset-impl is lazy; shards are written as mmap alone"),
        ("--dataset-impl", "--dataset-impl has no value"),
        ("--lang --input a", "--lang has no value"),
        ("--partitions two", "--partitions is two; pass a whole number"),
        ("--find-optimal-num-workers", "pass the number of cores to --workers"),
        ("--workers-to-check 16 32", "--workers-to-check is part of --find-optimal-num-workers"),
        ("--performance-dir d", "--performance-dir is part of --find-optimal-num-workers"),
        ("--max-documents 9", "to tokenize less, pass fewer --input"),
        ("--json-keys text title", r"names 2 keys \(text, title\), .*; run once for each key"),
        ("--json-keys", "--json-keys names no key"),
        ("--json-keys --append-eod", "--json-keys names no key"),
    ],
)
def test_flags_that_ask_for_what_is_not_offered_are_refused(arguments: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        own_arguments(["--input", "a", *arguments.split()])
