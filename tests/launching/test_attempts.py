"""The list of attempts: appended, cut lines tolerated, numbers that two processes cannot share."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megatron_mup.errors import ConfigError
from megatron_mup.launching.attempts import (
    BEGIN,
    DECIDE,
    append_event,
    claim_attempt,
    current_attempt,
    read_events,
)
from megatron_mup.launching.run_folder import (
    RunFolder,
    attempt_of_process,
    existing_run_folder,
)
from tests.launching.run_folders import checkpoint, event_list


def test_events_come_back_in_their_order(tmp_path: Path) -> None:
    folder = event_list(tmp_path)
    append_event(folder, BEGIN, 1, lr=0.5)
    append_event(folder, DECIDE, 1, decision="stop")
    assert [(event["event"], event["attempt"]) for event in read_events(folder)] == [
        ("begin", 1),
        ("decide", 1),
    ]
    assert read_events(folder)[0]["lr"] == 0.5


def test_a_line_that_was_cut_costs_itself_alone(tmp_path: Path) -> None:
    folder = event_list(tmp_path)
    append_event(folder, BEGIN, 1)
    with folder.attempts.open("ab") as stream:
        stream.write(b'{"event": "begin", "att')
    append_event(folder, BEGIN, 3)
    assert [event["attempt"] for event in read_events(folder)] == [1, 3]


@pytest.mark.parametrize(
    "line", ["", "[1]", '"begin"', '{"event": "begin"}', '{"event": "x", "attempt": 1}', "\x00\xff",
             "[" * 100_000, '{"event": "begin", "attempt": "1"}']
)  # fmt: skip
def test_what_is_no_event_is_passed_over(line: str, tmp_path: Path) -> None:
    folder = event_list(tmp_path)
    folder.attempts.write_bytes(line.encode("latin-1") + b"\n")
    assert read_events(folder) == []


def test_racing_processes_get_different_numbers(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        numbers = list(pool.map(lambda _: claim_attempt(RunFolder(tmp_path)), range(8)))
    assert sorted(numbers) == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_number_of_the_list_is_not_given_again_though_its_folder_is_gone(tmp_path: Path) -> None:
    folder = event_list(tmp_path, {"event": "begin", "attempt": 4})
    assert claim_attempt(folder) == 5


def test_a_run_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write to --run-dir"):
        claim_attempt(RunFolder(tmp_path / "file" / "run"))


def test_a_command_is_about_the_named_attempt_else_about_the_latest(tmp_path: Path) -> None:
    folder = event_list(
        tmp_path, {"event": "begin", "attempt": 1}, {"event": "begin", "attempt": 2}
    )
    assert current_attempt(folder, None) == 2
    assert current_attempt(folder, 1) == 1
    assert attempt_of_process({"MEGATRON_MUP_ATTEMPT": "7"}) == 7
    for text in ("", "0", "-1", "x", "1.5"):
        assert attempt_of_process({"MEGATRON_MUP_ATTEMPT": text}) is None


def test_a_folder_where_nothing_began_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="launch begin' comes first"):
        existing_run_folder(tmp_path)
    folder = event_list(tmp_path, {"event": "decide", "attempt": 1})
    with pytest.raises(ConfigError, match="names no attempt"):
        current_attempt(folder, None)


def test_the_newest_checkpoint_is_a_whole_one_of_the_configured_folder(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.newest_checkpoint() is None
    checkpoint(tmp_path, 20)
    checkpoint(tmp_path, 100)
    (tmp_path / "checkpoints" / "iter_0000300").mkdir()
    (tmp_path / "checkpoints" / "iter_0000400.tmp").mkdir()
    (tmp_path / "checkpoints" / "iter_0000400.tmp" / "checksums.json").write_text("")
    assert folder.newest_checkpoint() == 100
    folder.launch.mkdir()
    folder.config.write_text(json.dumps({"checkpoint": {"save": str(tmp_path / "elsewhere")}}))
    assert folder.newest_checkpoint() is None
