"""A user's text as the lines of a sweep's corpus, always the same ones. Must not import torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_mup.data.documents import read_documents

PIECE_CHARACTERS = 4096
"""A user's text is cut into documents of about this size, so that some can be held out."""


def corpus_records(text: Sequence[Path]) -> Iterator[bytes]:
    """The lines of ``corpus.jsonl`` that files become.

    Args:
        text: text or JSONL files, in this order.

    Raises:
        DataError: a document cannot be read.
    """
    for document in read_documents(text):
        # One book is one document, of which nothing or everything would be held out.
        for piece in cut_text(document.text):
            yield json.dumps({"text": piece}, ensure_ascii=False).encode("utf-8") + b"\n"


def cut_text(text: str) -> Iterator[str]:
    """Cut a text at line ends into pieces of about ``PIECE_CHARACTERS``; empty ones are dropped."""
    piece: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        piece.append(line)
        size += len(line)
        if size >= PIECE_CHARACTERS:
            yield "".join(piece)
            piece, size = [], 0
    if "".join(piece).strip():
        yield "".join(piece)
