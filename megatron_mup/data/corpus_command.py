"""``megatron-mup data corpus``: writes the text that every machine has, for trying things out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_mup.data.corpus import write_corpus
from megatron_mup.data.preprocess_command import Overwrite

Output = Annotated[Path, typer.Option(help="JSON lines file to write.")]
MaxBytes = Annotated[int, typer.Option(help="Limit of the UTF-8 bytes of all texts together.")]
Seed = Annotated[int, typer.Option(help="Seed of the documents' order.")]


def corpus_command(
    output: Output,
    max_bytes: MaxBytes = 4_000_000,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Write installed Python sources and documentation as documents, for trying things out."""
    output.parent.mkdir(parents=True, exist_ok=True)
    count = write_corpus(output, max_bytes=max_bytes, seed=seed, overwrite=overwrite)
    typer.echo(f"{output}: {count} documents, {output.stat().st_size} bytes")
