"""A sweep's own text: corpus, tokenizer and token shards, each made once."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_mup.data.corpus import write_corpus
from megatron_mup.data.manifest import job_manifest_path, read_job_manifest
from megatron_mup.data.preprocess import PreprocessOptions, preprocess
from megatron_mup.data.publication import publish_text, published
from megatron_mup.data.shards import open_shard
from megatron_mup.data.tokenizer import load_tokenizer
from megatron_mup.data.tokenizer_training import TokenizerOptions, train_tokenizer
from megatron_mup.errors import DataError
from megatron_mup.transfer.sweep.text_records import corpus_records
from megatron_mup.transfer.sweep.text_source import (
    check_text,
    corpus_of,
    has_shards,
    note_text,
    noted_files,
    source_words,
)

VALID_FRACTION = 0.05
MAX_VALID_FRACTION = 0.5
_SPARE = 1.1
"""Share that is aimed at, over the one that is needed."""
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
        text: the user's text or JSONL files; empty means the shards that are there, whatever they
            are made of, or installed Python text where there are none.
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
    check_text(folder, text)
    _check_amounts(folder, vocab_size=vocab_size, corpus_bytes=corpus_bytes)
    if not has_shards(folder):
        _make_missing(
            folder, text=text, corpus_bytes=corpus_bytes, vocab_size=vocab_size, echo=echo
        )
        # Published last: where it is, all is; what an interruption left behind is overwritten.
        _split_text(corpus_of(folder), folder, valid_tokens)
    elif not text:
        echo(f"text: {source_words(folder)}, which the shards in {folder} are made of")
    _check_size(folder, valid_tokens, echo)
    return folder


def _make_missing(
    folder: Path,
    *,
    text: Sequence[Path],
    corpus_bytes: int,
    vocab_size: int,
    echo: Callable[[str], None],
) -> None:
    """Notes, corpus and tokenizer, as far as they are not there."""
    folder.mkdir(parents=True, exist_ok=True)
    publish_text(
        folder / "amounts.json",
        json.dumps({"vocab_size": vocab_size, "corpus_bytes": corpus_bytes}),
    )
    corpus = corpus_of(folder)
    if not corpus.exists():
        note_text(folder, text)
        documents = _write_text(corpus, text, corpus_bytes)
        echo(f"text: {corpus.stat().st_size / 1e6:.1f} MB, {documents} documents in {corpus}")
    _make_tokenizer(corpus, vocab_size, echo)


def _tokenizer_of(folder: Path) -> Path:
    return folder / "tokenizer.model"


def _make_tokenizer(corpus: Path, vocab_size: int, echo: Callable[[str], None]) -> None:
    model = _tokenizer_of(corpus.parent)
    if not model.exists():
        options = TokenizerOptions(vocab_size=vocab_size)
        report = train_tokenizer([corpus], model.with_suffix(""), options=options)
        echo(f"tokenizer: {report.vocab_size} ids in {model}")


def _split_text(corpus: Path, folder: Path, valid_tokens: int) -> None:
    """Tokenize, again with a larger share held out for as long as it is too small."""
    tokenizer = load_tokenizer(_tokenizer_of(folder))
    fraction = VALID_FRACTION
    while True:
        options = PreprocessOptions(valid_fraction=fraction, overwrite=True)
        preprocess([corpus], folder / "text", tokenizer=tokenizer, options=options)
        train, valid = _sizes(folder)
        if valid >= valid_tokens:
            return
        # Documents go by their hash, so that a share is met but roughly.
        fraction = max(1.2 * fraction, _SPARE * valid_tokens / (train + valid))
        if fraction > MAX_VALID_FRACTION:
            # These shards would serve no smaller number either.
            job_manifest_path(folder / "text").unlink()
            most = int(MAX_VALID_FRACTION / _SPARE * (train + valid))
            raise DataError(
                f"{valid_tokens:,} tokens are to be held out (text.valid_tokens; unset: what "
                f"run.eval_tokens reads, and one token more), but of the text's {train + valid:,} "
                f"at most half are, about {most:,} for sure if it has lines enough; lower that, or "
                "give a longer text with another --out"
            )


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
            f"the held-out part of the text has {valid:,} of {train + valid:,} tokens, fewer than "
            f"{valid_tokens:,} (text.valid_tokens; unset: what run.eval_tokens reads, and one "
            "token more); lower that, or choose another --out, whose shards are made for it"
        )
    echo(f"shards: {train:,} training and {valid:,} held-out tokens in {folder}")


def _check_amounts(folder: Path, *, vocab_size: int, corpus_bytes: int) -> None:
    """One folder belongs to one vocabulary and, of installed text, to one size of corpus."""
    note = folder / "amounts.json"
    if not note.exists():
        return
    before = json.loads(note.read_text(encoding="utf-8"))
    whole = has_shards(folder)
    # Only of what is made already: a refused attempt is to be mended in the same folder.
    asked = {}
    if whole or _tokenizer_of(folder).exists():
        asked["vocab_size"] = vocab_size
    if noted_files(folder) == [] and (whole or corpus_of(folder).exists()):
        asked["corpus_bytes"] = corpus_bytes
    for name, amount in asked.items():
        if before.get(name) != amount:
            raise DataError(
                f"{folder} was made with text.{name} {before.get(name)}, not {amount}; choose "
                "another --out, or set that again"
            )


def _write_text(corpus: Path, text: Sequence[Path], corpus_bytes: int) -> int:
    """Write the corpus; returns the number of documents."""
    if not text:
        return write_corpus(corpus, max_bytes=corpus_bytes)
    count = 0
    with published(corpus) as stream:
        for record in corpus_records(text):
            stream.write(record)
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
