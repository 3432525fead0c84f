"""How a user's text is cut into the documents of a corpus."""

from __future__ import annotations

from pathlib import Path

from megatron_mup.transfer.sweep.text_records import corpus_records, cut_text


def test_cutting_keeps_every_character_and_drops_only_blank_ends() -> None:
    text = "".join(f"line {n}\n" for n in range(2000))
    pieces = list(cut_text(text))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) < 4200
    assert list(cut_text(" \n \n")) == []


def test_files_become_one_record_a_piece_in_order(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("x" * 4095 + "\nzwei \u00e4\n")
    (tmp_path / "a.jsonl").write_text('{"text": "eins"}\n{"text": ""}\n')
    records = list(corpus_records([tmp_path / "b.txt", tmp_path / "a.jsonl"]))
    assert records == [
        b'{"text": "' + b"x" * 4095 + b'\\n"}\n',
        '{"text": "zwei \u00e4\\n"}\n'.encode(),
        b'{"text": "eins"}\n',
    ]
