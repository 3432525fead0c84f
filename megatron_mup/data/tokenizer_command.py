"""``megatron-mup data tokenizer``: reads arguments, trains a tokenizer, prints its report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_mup.data.preprocess_command import Inputs, JsonKey, MoreInputs, Overwrite
from megatron_mup.data.tokenizer_training import (
    DEFAULT_SAMPLE_BYTES,
    ModelType,
    TokenizerOptions,
    TokenizerReport,
    train_tokenizer,
)

ModelPrefix = Annotated[Path, typer.Option(help="The model is written to PREFIX.model.")]
VocabSize = Annotated[int, typer.Option(help="Number of ids, special ones included.")]
Algorithm = Annotated[ModelType, typer.Option(help="Algorithm.")]
SpecialToken = Annotated[
    list[str] | None,
    typer.Option(
        help="A string, such as <|im_start|>, that is one id wherever a text has it, and is never "
        "split. May be repeated."
    ),
]
PadVocabToMultiple = Annotated[
    int,
    typer.Option(
        help="Enlarge the vocabulary to a multiple of this, by learned pieces as far as the text "
        "gives them, then by unused ones."
    ),
]
SampleBytes = Annotated[
    int, typer.Option(help="Bytes of text to train on, as documents chosen by hash; 0 takes all.")
]
ByteFallback = Annotated[
    bool, typer.Option(help="Spell unknown characters in bytes; without it they are lost.")
]
CharacterCoverage = Annotated[
    float, typer.Option(help="Share of characters with a piece of their own.")
]
InputSentenceSize = Annotated[
    int, typer.Option(help="Lines that sentencepiece takes from the sample; 0 takes all.")
]
NumThreads = Annotated[int, typer.Option(help="Training threads.")]
HeldOutFraction = Annotated[
    float, typer.Option(help="Share of documents to measure compression on, not trained on.")
]


def tokenizer_command(
    model_prefix: ModelPrefix,
    vocab_size: VocabSize,
    input: Inputs = None,
    more_inputs: MoreInputs = None,
    model_type: Algorithm = "bpe",
    special_token: SpecialToken = None,
    pad_vocab_to_multiple: PadVocabToMultiple = 1,
    sample_bytes: SampleBytes = DEFAULT_SAMPLE_BYTES,
    byte_fallback: ByteFallback = True,
    character_coverage: CharacterCoverage = 0.9995,
    input_sentence_size: InputSentenceSize = 0,
    num_threads: NumThreads = 1,
    held_out_fraction: HeldOutFraction = 0.05,
    json_key: JsonKey = "text",
    overwrite: Overwrite = False,
) -> None:
    """Train a sentencepiece tokenizer that keeps every character."""
    options = TokenizerOptions(
        vocab_size=vocab_size,
        model_type=model_type,
        special_tokens=tuple(special_token or ()),
        pad_vocab_to_multiple=pad_vocab_to_multiple,
        sample_bytes=sample_bytes,
        byte_fallback=byte_fallback,
        character_coverage=character_coverage,
        input_sentence_size=input_sentence_size,
        num_threads=num_threads,
        held_out_fraction=held_out_fraction,
    )
    inputs = [*(input or []), *(more_inputs or [])]
    report = train_tokenizer(
        inputs, model_prefix, options=options, json_key=json_key, overwrite=overwrite
    )
    typer.echo("\n".join(report_lines(report)))


def report_lines(report: TokenizerReport) -> list[str]:
    """Describe a trained tokenizer.

    Args:
        report: What ``train_tokenizer`` returned.

    Returns:
        Lines to print.
    """
    unused = f" ({report.unused_ids} unused)" if report.unused_ids else ""
    lines = [
        f"{report.model_path}: {report.vocab_size} ids{unused}, sha256 {report.sha256}",
        f"trained on {report.training_documents} documents, {report.training_bytes} bytes",
    ]
    if report.held_out_bytes_per_token is None:
        return [*lines, "compression not measured: no text fell into the held-out share"]
    return [
        *lines,
        f"{report.held_out_bytes_per_token:.3f} bytes/token on {report.held_out_documents} "
        "held-out documents",
    ]
