"""``megatron-mup data corpus`` writes text that the other commands read."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from megatron_mup.data.commands import app
from megatron_mup.errors import DataError


def test_the_text_of_this_machine_is_written_within_the_limit(tmp_path: Path) -> None:
    corpus = tmp_path / "new folder/corpus.jsonl"
    arguments = ["corpus", "--output", str(corpus), "--max-bytes", "60000"]

    result = CliRunner().invoke(app, arguments)

    documents = [json.loads(line)["text"] for line in corpus.read_text("utf-8").splitlines()]
    assert result.exit_code == 0
    assert documents
    assert sum(len(text.encode()) for text in documents) <= 60_000
    assert result.stdout.strip() == (
        f"{corpus}: {len(documents)} documents, {corpus.stat().st_size} bytes"
    )


def test_a_corpus_that_is_there_is_kept_unless_it_is_to_be_replaced(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("mine")
    arguments = ["corpus", "--output", str(corpus), "--max-bytes", "60000"]

    assert isinstance(CliRunner().invoke(app, arguments).exception, DataError)
    assert corpus.read_text() == "mine"

    assert CliRunner().invoke(app, [*arguments, "--overwrite"]).exit_code == 0
    assert corpus.read_text() != "mine"
