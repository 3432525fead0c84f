"""The options of ``megatron-mup convert``, as typer takes them. Imports nothing that is slow."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

Load = Annotated[
    Path, typer.Option("--load", help="Run folder, or one iter_* folder of it.", metavar="DIR")
]
CkptStep = Annotated[
    int | None, typer.Option("--ckpt-step", help="Iteration; unset: the newest.", metavar="N")
]
Save = Annotated[Path, typer.Option("--save", help="Folder of the new checkpoint.", metavar="DIR")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="key=value or section.key=value", metavar="KEY=VALUE")
]
Config = Annotated[
    Path | None, typer.Option("--config", help="YAML of the target's parameterization.")
]
Preset = Annotated[str | None, typer.Option("--preset", help="Named experiment of the target.")]
Width = Annotated[int | None, typer.Option("--width", help="Hidden size of the preset.")]
TokenizerModel = Annotated[
    Path | None,
    typer.Option("--tokenizer-model", help="sentencepiece .model or tokenizer.json.", metavar="F"),
]
EodToken = Annotated[
    str | None,
    typer.Option("--eod-token", help="The piece that ends a document; unset: the model's."),
]
AnyTokenizer = Annotated[
    bool, typer.Option("--any-tokenizer", help="Accept a tokenizer that is not the recorded one.")
]
Verify = Annotated[
    bool, typer.Option("--verify/--no-verify", help="Compare log-probabilities at the end.")
]
Text = Annotated[
    Path | None, typer.Option("--text", help="Text file to verify on.", metavar="FILE")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]
CheckFiles = Annotated[
    bool,
    typer.Option("--check/--no-check", help="Compare the SHA-256 of all files meanwhile."),
]


class FormatName(StrEnum):
    """The values of --format; ``formats.HfFormat`` would import torch for --help."""

    granite = "granite"
    llama = "llama"
    megatron_mup = "megatron_mup"


Output = Annotated[Path, typer.Option("--output", help="Folder to make.", metavar="DIR")]
Format = Annotated[
    FormatName,
    typer.Option("--format", help="granite: own multipliers; llama: folded into weights."),
]
Dtype = Annotated[
    str | None, typer.Option("--dtype", help="float32, bfloat16 or float16; unset: the run's.")
]
MaxShardSize = Annotated[
    str, typer.Option("--max-shard-size", help="Bytes of a file, e.g. 500MB.", metavar="SIZE")
]
AllowNonFinite = Annotated[bool, typer.Option("--allow-non-finite", help="Export a diverged run.")]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Verify with the folder's modeling files, though they are not this version's.",
    ),
]
CheckWeights = Annotated[
    bool,
    typer.Option(
        "--check/--no-check", help="Compare the SHA-256 of the weights, if the folder has it."
    ),
]
Input = Annotated[
    Path, typer.Option("--input", help="Llama, Granite or our own folder.", metavar="DIR")
]
