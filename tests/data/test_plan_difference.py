"""Two jobs differ in options and inputs, which are named as on the command line."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_mup.data.plan_difference import plan_difference

INPUT = {"name": "a.jsonl", "bytes": 10, "fingerprint": "f"}
OTHER = {"name": "b.jsonl", "bytes": 20, "fingerprint": "g"}
PLAN: dict[str, Any] = {
    "format_version": 1,
    "options": {
        "json_key": "text",
        "valid_fraction": 0.1,
        "deduplicate": False,
        "append_eod": True,
        "shard_tokens": None,
    },
    "unit_bytes": 100,
    "tokenizer_sha256": "a" * 64,
    "eod": 2,
    "inputs": [INPUT, OTHER],
}


def differing(**changes: Any) -> str:
    return plan_difference(PLAN, PLAN | changes)


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("json_key", "content", "--json-key text then, --json-key content now"),
        ("valid_fraction", 0.2, "--valid-fraction 0.1 then, --valid-fraction 0.2 now"),
        ("deduplicate", True, "no --deduplicate then, --deduplicate now"),
        ("append_eod", False, "--append-eod then, --no-append-eod now"),
        ("shard_tokens", 500, "no --shard-tokens then, --shard-tokens 500 now"),
    ],
)
def test_an_option_is_named_with_both_values(option: str, value: object, expected: str) -> None:
    assert differing(options=PLAN["options"] | {option: value}) == expected


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ([INPUT], "--input b.jsonl is not there now"),
        ([INPUT, OTHER, OTHER | {"name": "c"}], "--input c was not there then"),
        ([INPUT, OTHER | {"bytes": 9}], "the input b.jsonl has changed (20 bytes then, 9 now)"),
        (
            [INPUT, OTHER | {"fingerprint": "h"}],
            "the input b.jsonl has changed (20 bytes as before, but other ones)",
        ),
        (
            [OTHER, INPUT],
            "the same inputs were named in another order, or another number of times",
        ),
    ],
)
def test_inputs_that_differ_are_named(inputs: list[Any], expected: str) -> None:
    # The size of the units follows from them, and is no cause of its own.
    assert differing(inputs=inputs, unit_bytes=1) == expected


def test_the_tokenizer_is_named_once() -> None:
    assert differing(tokenizer_sha256="b" * 64, eod=3) == (
        "--tokenizer-model was a file of other contents (SHA-256 aaaaaaaaaaaa... then, "
        "bbbbbbbbbbbb... now)"
    )
    assert differing(eod=3) == "--eod-token meant id 2 then, id 3 now"


def test_all_differences_are_named_up_to_a_few() -> None:
    options = {"json_key": "k", "valid_fraction": 0.0}
    assert differing(options=PLAN["options"] | options, inputs=[INPUT]) == (
        "--json-key text then, --json-key k now; "
        "--valid-fraction 0.1 then, --valid-fraction 0.0 now; --input b.jsonl is not there now"
    )
    many = [INPUT | {"name": f"{number}.jsonl"} for number in range(9)]
    found = differing(inputs=many)
    assert found.startswith("--input 0.jsonl was not there then; ")
    assert found.endswith("; and 7 more")
    assert found.count("--input") == 4


def test_what_no_option_decides_is_said_to_be_the_programs() -> None:
    assert differing(format_version=2) == (
        "format_version was 1, now 2 (the version of the program differs)"
    )
