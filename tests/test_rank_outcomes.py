"""The notes that ranks leave of their ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_mup.rank_outcomes import node_name, read_outcomes, tell_outcome


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MEGATRON_MUP_OUTCOMES", str(tmp_path / "0001"))
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    return tmp_path / "0001"


def test_notes_come_back_in_the_order_of_time(folder: Path) -> None:
    tell_outcome(5, 76, "lost")
    tell_outcome(2, 1, "KeyError: 'x'")
    found = read_outcomes(folder)
    assert [(note.rank, note.node, note.exit_code, note.reason) for note in found] == [
        (5, "n7", 76, "lost"),
        (2, "n7", 1, "KeyError: 'x'"),
    ]
    assert found[0].time <= found[1].time
    assert sorted(path.name for path in folder.iterdir()) == ["rank-00002.json", "rank-00005.json"]


def test_the_first_note_of_a_rank_stays(folder: Path) -> None:
    tell_outcome(0, 1, "first")
    tell_outcome(0, 76, "second")
    assert [note.reason for note in read_outcomes(folder)] == ["first"]


def test_a_note_holds_no_secret(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "d41d8cd98f00b204e9800998ecf8427e00000000")
    tell_outcome(0, 1, "cannot log in with d41d8cd98f00b204e9800998ecf8427e00000000")
    (path,) = folder.iterdir()
    assert "d41d8cd98f00" not in path.read_text()
    assert read_outcomes(folder)[0].reason.startswith("cannot log in with ")


def test_nothing_is_written_unless_a_launcher_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MEGATRON_MUP_OUTCOMES", raising=False)
    monkeypatch.chdir(tmp_path)
    tell_outcome(0, 1, "x")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_costs_the_note_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MEGATRON_MUP_OUTCOMES", str(tmp_path / "file" / "0001"))
    tell_outcome(0, 1, "x")


@pytest.mark.parametrize("text", ["", "[]", '{"rank": 1}', "\x00", '{"rank": "x"}', "[" * 99_000])
def test_damaged_notes_are_passed_over(text: str, folder: Path) -> None:
    tell_outcome(3, 1, "x")
    (folder / "rank-00009.json").write_text(text)
    assert [note.rank for note in read_outcomes(folder)] == [3]


def test_a_node_is_known_by_the_scheduler_s_name() -> None:
    assert node_name({"SLURMD_NODENAME": "n3"}) == "n3"
    assert node_name({}) != ""
