"""``megatron-mup data <verb>``: reads arguments, calls one function, prints its report."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from megatron_mup.data.preprocess import PreprocessOptions
from megatron_mup.data.preprocess import preprocess as make_shards
from megatron_mup.data.shards import inspect_shard
from megatron_mup.data.tokenizer import load_tokenizer
from megatron_mup.data.tokenizer_training import (
    ModelType,
    TokenizerOptions,
    TokenizerReport,
    train_tokenizer,
)
from megatron_mup.errors import DataError

app = typer.Typer(no_args_is_help=True, help="Tokenizers and token shards.")

# Megatron's `--input A B C`: an option takes one value here, so the further ones arrive as
# arguments.
Inputs = Annotated[
    list[Path] | None,
    typer.Option("--input", help="Text files (one document each) or JSON lines; may be repeated."),
]
MoreInputs = Annotated[
    list[Path] | None, typer.Argument(metavar="FILE", help="Further input files.")
]
JsonKey = Annotated[
    str, typer.Option("--json-key", "--json-keys", help="Key of the text in JSON lines.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace existing output.")]


@app.command()
def tokenizer(
    model_prefix: Annotated[Path, typer.Option(help="The model is written to PREFIX.model.")],
    vocab_size: Annotated[int, typer.Option(help="Number of ids, special ones included.")],
    input: Inputs = None,
    more_inputs: MoreInputs = None,
    model_type: Annotated[ModelType, typer.Option(help="Algorithm.")] = "bpe",
    byte_fallback: Annotated[
        bool, typer.Option(help="Spell unknown characters in bytes; without it they are lost.")
    ] = True,
    character_coverage: Annotated[
        float, typer.Option(help="Share of characters with a piece of their own.")
    ] = 0.9995,
    input_sentence_size: Annotated[
        int, typer.Option(help="Lines to sample from a huge corpus; 0 takes all.")
    ] = 0,
    num_threads: Annotated[int, typer.Option(help="Training threads.")] = 1,
    held_out_fraction: Annotated[
        float, typer.Option(help="Share of documents to measure compression on, not trained on.")
    ] = 0.05,
    json_key: JsonKey = "text",
    overwrite: Overwrite = False,
) -> None:
    """Train a sentencepiece tokenizer that keeps every character."""
    report = train_tokenizer(
        [*(input or []), *(more_inputs or [])],
        model_prefix,
        options=TokenizerOptions(
            vocab_size=vocab_size,
            model_type=model_type,
            byte_fallback=byte_fallback,
            character_coverage=character_coverage,
            input_sentence_size=input_sentence_size,
            num_threads=num_threads,
            held_out_fraction=held_out_fraction,
        ),
        json_key=json_key,
        overwrite=overwrite,
    )
    _print_report(report)


def _print_report(report: TokenizerReport) -> None:
    typer.echo(f"{report.model_path}: {report.vocab_size} ids, sha256 {report.sha256}")
    typer.echo(f"trained on {report.training_documents} documents")
    if report.held_out_bytes_per_token is None:
        typer.echo("compression not measured: no text fell into the held-out share")
    else:
        typer.echo(
            f"{report.held_out_bytes_per_token:.3f} bytes/token on {report.held_out_documents} "
            "held-out documents"
        )


@app.command()
def preprocess(
    tokenizer_model: Annotated[Path, typer.Option(help="The sentencepiece .model file.")],
    output_prefix: Annotated[
        Path, typer.Option(help="Shards are PREFIX_train and PREFIX_valid, or PREFIX.")
    ],
    input: Inputs = None,
    more_inputs: MoreInputs = None,
    json_key: JsonKey = "text",
    append_eod: Annotated[
        bool, typer.Option(help="End each document with the end-of-document id.")
    ] = True,
    valid_fraction: Annotated[
        float, typer.Option(help="Share of documents held out, by hash; 0 makes one shard.")
    ] = 0.05,
    workers: Annotated[int, typer.Option(help="Processes that tokenize.")] = 1,
    overwrite: Overwrite = False,
) -> None:
    """Tokenize documents into Megatron token shards (.bin and .idx)."""
    options = PreprocessOptions(
        json_key=json_key,
        append_eod=append_eod,
        valid_fraction=valid_fraction,
        workers=workers,
        overwrite=overwrite,
    )
    manifests = make_shards(
        [*(input or []), *(more_inputs or [])],
        output_prefix,
        tokenizer=load_tokenizer(tokenizer_model),
        options=options,
    )
    for prefix, manifest in manifests.items():
        typer.echo(
            f"{prefix}: {manifest.documents} documents, {manifest.tokens} tokens "
            f"({manifest.dtype}, {manifest.text_bytes / manifest.tokens:.3f} bytes/token)"
        )


@app.command()
def inspect(
    prefix: Annotated[Path, typer.Argument(help="The shard without .bin or .idx.")],
    tokenizer_model: Annotated[
        Path | None, typer.Option(help="Decodes a sample of the first document.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Read a whole shard and describe it."""
    tokenizer = load_tokenizer(tokenizer_model) if tokenizer_model else None
    summary = dataclasses.asdict(inspect_shard(prefix, tokenizer=tokenizer))
    if as_json:
        typer.echo(json.dumps(summary))
    else:
        for name, value in summary.items():
            shown = "-" if value is None else repr(value) if name == "sample" else value
            typer.echo(f"{name.replace('_', ' '):>22}  {shown}")
    if summary["manifest_matches"] is False:
        raise DataError(
            f"{prefix}.bin is not the file that {prefix}.json describes (SHA-256 differs); copy "
            "the shard again or preprocess with --overwrite"
        )
