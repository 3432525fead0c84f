"""A sweep's own text: corpus, tokenizer and token shards, each made once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from megatron_mup.data.corpus import write_corpus
from megatron_mup.data.documents import check_inputs, read_documents
from megatron_mup.data.manifest import job_manifest_path, read_job_manifest
from megatron_mup.data.preprocess import PreprocessOptions, preprocess
from megatron_mup.data.publication import publish_text, published
from megatron_mup.data.shards import open_shard
from megatron_mup.data.tokenizer import load_tokenizer
from megatron_mup.data.tokenizer_training import TokenizerOptions, train_tokenizer
from megatron_mup.errors import DataError

PIECE_CHARACTERS = 4096
"""A user's text is cut into documents of about this size, so that some can be held out."""

VALID_FRACTION = 0.05
MAX_VALID_FRACTION = 0.5
MIN_VALID_TOKENS = 2_000
MIN_TEXT_BYTES = 200_000
"""Less text has too few distinct pieces for the tokenizer."""


def make_shards(
    folder: Path,
    *,
    text: Sequence[Path],
    corpus_bytes: int,
    vocab_size: int,
    echo: Callable[[str], None],
    valid_tokens: int = MIN_VALID_TOKENS,
) -> Path:
    """Make ``text_train`` and ``text_valid`` shards unless they are there.

    Args:
        folder: receives corpus, tokenizer and shards.
        text: the user's text or JSONL files; empty means installed Python text.
        corpus_bytes: how much installed text to take.
        vocab_size: ids of the tokenizer.
        echo: receives progress lines.
        valid_tokens: least held-out tokens; more than a twentieth of the text only if needed.

    Returns:
        ``folder``.

    Raises:
        DataError: the text is missing, empty or too short, or another text or vocabulary was used
            before.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _check_source(folder, text)
    _check_amounts(folder, {"vocab_size": vocab_size, "corpus_bytes": corpus_bytes})
    corpus = folder / "corpus.jsonl"
    if not corpus.exists():
        documents = _write_text(corpus, text, corpus_bytes)
        echo(f"text: {corpus.stat().st_size / 1e6:.1f} MB, {documents} documents in {corpus}")
    _make_tokenizer(corpus, vocab_size, echo)
    # Published last: where it is, all is; what an interruption left behind is overwritten.
    if not job_manifest_path(folder / "text").exists():
        _split_text(corpus, folder, valid_tokens)
    _check_size(folder, valid_tokens, echo)
    return folder


def _make_tokenizer(corpus: Path, vocab_size: int, echo: Callable[[str], None]) -> None:
    model = corpus.with_name("tokenizer.model")
    if not model.exists():
        options = TokenizerOptions(vocab_size=vocab_size)
        report = train_tokenizer([corpus], model.with_suffix(""), options=options)
        echo(f"tokenizer: {report.vocab_size} ids in {model}")


def _split_text(corpus: Path, folder: Path, valid_tokens: int) -> None:
    """Tokenize, again with a larger share held out for as long as it is too small."""
    tokenizer = load_tokenizer(folder / "tokenizer.model")
    fraction = VALID_FRACTION
    while True:
        options = PreprocessOptions(valid_fraction=fraction, overwrite=True)
        preprocess([corpus], folder / "text", tokenizer=tokenizer, options=options)
        train, valid = _sizes(folder)
        # Documents go by their hash, so that a share is met but roughly.
        fraction = max(1.2 * fraction, 1.1 * valid_tokens / (train + valid))
        if valid >= valid_tokens or fraction > MAX_VALID_FRACTION:
            return


def _sizes(folder: Path) -> tuple[int, int]:
    """Training and held-out tokens."""
    splits = read_job_manifest(job_manifest_path(folder / "text")).splits
    # Of a text of a few documents none may be held out, and there is no such shard.
    train, valid = (
        open_shard(folder / f"text_{part}").tokens if splits[part] else 0
        for part in ("train", "valid")
    )
    return train, valid


def _check_size(folder: Path, valid_tokens: int, echo: Callable[[str], None]) -> None:
    """Say how many tokens there are; too few held-out ones make the losses noise."""
    train, valid = _sizes(folder)
    if valid < valid_tokens:
        raise DataError(
            f"the held-out part of the text has {valid} tokens, fewer than {valid_tokens}; use a "
            "longer text, or delete the folder if it was made for fewer"
        )
    echo(f"shards: {train:,} training and {valid:,} held-out tokens in {folder}")


def _check_amounts(folder: Path, amounts: dict[str, int]) -> None:
    """One folder belongs to one vocabulary and one size of corpus."""
    note = folder / "amounts.json"
    if note.exists():
        before = json.loads(note.read_text(encoding="utf-8"))
        for name, amount in amounts.items():
            if before.get(name) != amount:
                raise DataError(
                    f"{folder} was made with {name} {before.get(name)}, not {amount}; choose "
                    "another --out folder or delete this one"
                )
    publish_text(note, json.dumps(amounts))


def _check_source(folder: Path, text: Sequence[Path]) -> None:
    """One folder belongs to one text: records of different texts cannot be compared."""
    for path in text:
        if not path.is_file():
            raise DataError(f"there is no file '{path}'; correct --text (make: TEXT)")
    if text:
        check_inputs(text)
    # Absolute: the same relative name in another working folder is another text.
    source = json.dumps([str(path.resolve()) for path in text])
    note = folder / "source.json"
    if note.exists() and note.read_text(encoding="utf-8") != source:
        before = ", ".join(json.loads(note.read_text(encoding="utf-8")))
        raise DataError(
            f"{folder} was made from another text ({before or 'installed Python sources'}); "
            "choose another --out folder or delete this one"
        )
    publish_text(note, source)


def _write_text(corpus: Path, text: Sequence[Path], corpus_bytes: int) -> int:
    """Write the corpus; returns the number of documents."""
    if not text:
        return write_corpus(corpus, max_bytes=corpus_bytes)
    count = 0
    with published(corpus) as stream:
        for document in read_documents(text):
            # One book is one document, of which nothing or everything would be held out.
            for piece in cut_text(document.text):
                record = json.dumps({"text": piece}, ensure_ascii=False)
                stream.write(record.encode("utf-8") + b"\n")
                count += 1
        if count == 0:
            raise DataError(f"no text in {', '.join(map(str, text))}; give a file with text")
        size = stream.tell()
        if size < MIN_TEXT_BYTES:
            raise DataError(
                f"the text has {size:,} bytes, too few for a tokenizer; give at "
                f"least {MIN_TEXT_BYTES:,}, better some megabytes"
            )
    return count


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
