"""``megatron-mup data preprocess``: reads arguments, makes shards, prints what it made.

The flags of Megatron-LM's ``tools/preprocess_data.py`` that are no options here are
``megatron_flags``'.
"""

from __future__ import annotations

import dataclasses
import re
import time
from decimal import Decimal
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_mup.data.batches import MAX_DOCUMENT_BYTES
from megatron_mup.data.engines import EngineOption
from megatron_mup.data.inputs import InputFormat
from megatron_mup.data.manifest import JobManifest, job_manifest_path
from megatron_mup.data.preprocess import PreprocessOptions, preprocess
from megatron_mup.data.schedule import Part, Progress
from megatron_mup.data.tokenizer import Tokenizer, load_tokenizer
from megatron_mup.errors import DataError


class OnError(StrEnum):
    """What to do with a bad document."""

    STOP = "stop"
    SKIP = "skip"


Inputs = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        help="JSON lines, text (one document a file) or Parquet, plain or .gz, .zst, .xz; a file, "
        "a folder, a quoted glob, or - for standard input. May be repeated.",
        metavar="FILE",
    ),
]
MoreInputs = Annotated[
    list[str] | None, typer.Argument(metavar="FILE", help="Further inputs.", show_default=False)
]
JsonKey = Annotated[
    str,
    typer.Option(
        "--json-key",
        "--json-keys",
        help="Key of the text in JSON lines, column in Parquet.",
        metavar="KEY",
    ),
]
TokenizerModel = Annotated[
    Path,
    typer.Option(help="A sentencepiece .model, or a Hugging Face tokenizer.json.", metavar="FILE"),
]
EodToken = Annotated[
    str | None,
    typer.Option(
        help="The piece that ends a document, where the tokenizer does not tell.", metavar="PIECE"
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace existing output.")]
OutputPrefix = Annotated[
    Path,
    typer.Option(
        help="Shards are PREFIX_train, PREFIX_valid, PREFIX_test, or PREFIX alone.",
        metavar="PREFIX",
    ),
]
Format = Annotated[
    InputFormat | None, typer.Option(help="Format of all inputs; default: by file name.")
]
AppendEod = Annotated[bool, typer.Option(help="End each document with the end-of-document id.")]
ValidFraction = Annotated[
    float, typer.Option(help="Share of documents held out, by hash; 0 makes none.")
]
TestFraction = Annotated[
    float, typer.Option(help="Share of documents held out for a final test, by hash.")
]
Deduplicate = Annotated[
    bool, typer.Option("--deduplicate", help="Leave out exact copies of earlier documents.")
]
ShardTokens = Annotated[
    str | None,
    typer.Option(
        help="Most tokens of a shard, e.g. 500M: PREFIX_train-00000-of-00064 and so on; default: "
        "one shard.",
        metavar="N",
    ),
]
MaxDocumentBytes = Annotated[
    int, typer.Option(help="A larger JSON line or file is a bad document.")
]
ErrorPolicy = Annotated[
    OnError, typer.Option(help="At a bad document: stop, or skip and count it.")
]
EngineChoice = Annotated[
    EngineOption, typer.Option(help="What encodes; auto takes the fastest that is proved equal.")
]
Workers = Annotated[int, typer.Option(help="Processes.")]
Share = Annotated[
    str | None,
    typer.Option(
        help="Tokenize only share i of N, e.g. 3/8; the same command without it then does what is "
        "left and makes the shards.",
        metavar="i/N",
    ),
]
LogInterval = Annotated[
    float, typer.Option(help="Seconds between lines of progress; 0 prints none.")
]
# Megatron-LM's; the file says what it is.
TokenizerType = Annotated[str | None, typer.Option(hidden=True)]

_SENTENCEPIECE_TYPES = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")
_TOKENIZER_TYPES = {
    **dict.fromkeys(_SENTENCEPIECE_TYPES, "sentencepiece"),
    "HuggingFaceTokenizer": "huggingface",
}
"""Megatron-LM's names and the kind of tokenizer that they mean."""


def preprocess_command(
    tokenizer_model: TokenizerModel,
    output_prefix: OutputPrefix,
    input: Inputs = None,
    more_inputs: MoreInputs = None,
    json_key: JsonKey = "text",
    input_format: Format = None,
    eod_token: EodToken = None,
    append_eod: AppendEod = True,
    valid_fraction: ValidFraction = 0.05,
    test_fraction: TestFraction = 0.0,
    deduplicate: Deduplicate = False,
    shard_tokens: ShardTokens = None,
    max_document_bytes: MaxDocumentBytes = MAX_DOCUMENT_BYTES,
    on_error: ErrorPolicy = OnError.STOP,
    engine: EngineChoice = EngineOption.auto,
    workers: Workers = 1,
    part: Share = None,
    overwrite: Overwrite = False,
    log_interval: LogInterval = 10.0,
    tokenizer_type: TokenizerType = None,
) -> None:
    """Tokenize documents into Megatron token shards (.bin and .idx).

    Killed at any moment, the same command continues. The result does not depend on workers or
    parts.
    """
    # Before any other name is bound: the options have the names of their fields.
    given = locals()
    tokenizer = load_tokenizer(tokenizer_model, eod_token=eod_token)
    _check_type(tokenizer_type, tokenizer.kind)
    inputs = [*(input or []), *(more_inputs or [])]
    _run(inputs, output_prefix, tokenizer, _options(given), _Lines(log_interval))


def _options(given: dict[str, Any]) -> PreprocessOptions:
    """The options of the same names, and those that are written otherwise on the command line."""
    names = {field.name for field in dataclasses.fields(PreprocessOptions)}
    same = {name: value for name, value in given.items() if name in names}
    tokens, part = given["shard_tokens"], given["part"]
    return PreprocessOptions(
        **same
        | {
            "shard_tokens": None if tokens is None else parse_count(tokens, "--shard-tokens"),
            "part": None if part is None else parse_part(part),
            "skip_bad": given["on_error"] is OnError.SKIP,
        }
    )


def _run(
    inputs: list[str],
    output_prefix: Path,
    tokenizer: Tokenizer,
    options: PreprocessOptions,
    lines: _Lines,
) -> None:
    begun = time.monotonic()
    try:
        result = preprocess(
            inputs,
            output_prefix,
            tokenizer=tokenizer,
            options=options,
            progress=lines.show_progress,
            shard_progress=lambda done, total: lines.show(f"{done} of {total} shards made"),
        )
    except KeyboardInterrupt:
        typer.echo("stopped; the same command goes on where it ended", err=True)
        raise
    if lines.progress is not None:
        typer.echo(tokenized_line(lines.progress))
    typer.echo(f"done in {time.monotonic() - begun:.1f} s")
    if isinstance(result, JobManifest):
        _print_manifest(result, output_prefix)
        return
    part = f"{options.part.number}/{options.part.count}" if options.part else ""
    typer.echo(
        f"part {part}: {result.units} units, {result.documents} documents, {result.tokens} "
        "tokens; run the command without --part when all parts are done"
    )


def parse_count(text: str, option: str) -> int:
    """Read a number such as 500M.

    Args:
        text: Digits, perhaps with a decimal point or an exponent, and K, M, G (or B) for powers of
            1000.
        option: The command-line option; for the message.

    Returns:
        The number.

    Raises:
        DataError: It is no such number, or not a whole one.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?(?:E\d{1,2})?)([KMGB]?)", text.strip().upper())
    factors = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9}
    number = Decimal(match[1]) * factors[match[2]] if match else None
    if number is None or number != int(number):
        raise DataError(f"{option} is {text}; pass a whole number such as 250000, 500M or 190e9")
    return int(number)


def parse_part(text: str) -> Part:
    """Read ``i/N``.

    Raises:
        DataError: It is not of that form, or names no share.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None:
        raise DataError(f"--part is {text!r}; pass i/N with i from 1 to N, e.g. 3/8")
    return Part(int(match[1]), int(match[2]))


def _check_type(tokenizer_type: str | None, kind: str) -> None:
    """Compare Megatron's --tokenizer-type with what the file holds."""
    if tokenizer_type is not None and _TOKENIZER_TYPES.get(tokenizer_type) != kind:
        raise DataError(
            f"--tokenizer-type is {tokenizer_type}, --tokenizer-model holds a {kind} tokenizer; "
            f"leave --tokenizer-type out, or pass one of {', '.join(_TOKENIZER_TYPES)} that fits"
        )


class _Lines:
    """Lines of progress on standard error, from time to time."""

    def __init__(self, interval_seconds: float) -> None:
        self._interval, self._last = interval_seconds, time.monotonic()
        self.progress: Progress | None = None

    def show_progress(self, progress: Progress) -> None:
        """Note how far the tokenization is, and show it."""
        self.progress = progress
        self.show(progress_line(progress))

    def show(self, line: str) -> None:
        """Print a line, unless the one before was printed a moment ago."""
        now = time.monotonic()
        if self._interval and now - self._last >= self._interval:
            self._last = now
            typer.echo(line, err=True)


def progress_line(progress: Progress) -> str:
    """Return one line about the work so far."""
    parts = [
        f"{progress.documents} documents",
        f"{progress.text_bytes / 1e6:.0f} MB of text",
        f"{progress.tokens} tokens",
        f"{_speed(progress):.1f} MB/s",
    ]
    if progress.total_units is None:
        return f"{progress.units} units: {', '.join(parts)}"
    left = progress.seconds / progress.units * (progress.total_units - progress.units)
    parts.append(f"{left:.0f} s left")
    before = f" ({progress.earlier_units} more were there)" if progress.earlier_units else ""
    return f"{progress.units} of {progress.total_units} units{before}: {', '.join(parts)}"


def tokenized_line(progress: Progress) -> str:
    """Return one line about the tokenization that this run did."""
    return (
        f"tokenized {progress.text_bytes / 1e6:.1f} MB of text in {progress.seconds:.1f} s: "
        f"engine {progress.engine}, {_speed(progress):.1f} MB/s"
    )


def _speed(progress: Progress) -> float:
    """Megabytes of text a second."""
    return progress.text_bytes / 1e6 / max(progress.seconds, 1e-9)


def _print_manifest(manifest: JobManifest, output_prefix: Path) -> None:
    for split, shards in manifest.splits.items():
        if not shards:
            typer.echo(f"{split:>5}: no document, no shard")
            continue
        tokens, documents = sum(s.tokens for s in shards), sum(s.documents for s in shards)
        name = shards[0].name if len(shards) == 1 else f"{shards[0].name} ... {shards[-1].name}"
        ratio = sum(s.text_bytes for s in shards) / tokens
        typer.echo(
            f"{split:>5}: {output_prefix.parent / name}: {documents} documents, {tokens} tokens, "
            f"{ratio:.3f} bytes/token, {len(shards)} shard{'s' if len(shards) > 1 else ''}"
        )
    left_out = {
        "empty": manifest.empty_documents,
        "duplicate": manifest.duplicate_documents,
        **manifest.rejected_documents,
    }
    if any(left_out.values()):
        counts = ", ".join(f"{count} {name}" for name, count in left_out.items() if count)
        typer.echo(f"left out: {counts}")
    for place in manifest.rejected_places[:5]:
        typer.echo(f"  {place}")
    typer.echo(f"manifest: {job_manifest_path(output_prefix)}")
