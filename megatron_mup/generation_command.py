"""``megatron-mup generate``: reads arguments, loads a checkpoint, prints its text."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megatron_mup.errors import ConfigError

if TYPE_CHECKING:
    from megatron_mup.generation import Continuation, LoadedModel, Sampling

Load = Annotated[Path, typer.Option(help="Folder of checkpoint.save, or one iter_* folder.")]
TokenizerModel = Annotated[
    Path, typer.Option(help="The .model file or tokenizer.json of the run's data.")
]
CheckpointStep = Annotated[
    int | None, typer.Option("--ckpt-step", help="Iteration; unset takes the newest.")
]
EodToken = Annotated[
    str | None, typer.Option(help="The piece that ends a document; unset takes the model's own.")
]
Prompt = Annotated[list[str] | None, typer.Option(help="Text to continue. May be repeated.")]
PromptFile = Annotated[
    Path | None, typer.Option(help="Prompts, one a line; without any prompt, stdin is one.")
]
MaxNewTokens = Annotated[int, typer.Option(help="Longest continuation, tokens.")]
Temperature = Annotated[
    float, typer.Option(help="Divides the logits; 0 takes the most likely token.")
]
TopP = Annotated[float, typer.Option(help="Draw from the likeliest tokens up to this sum.")]
TopK = Annotated[int, typer.Option(help="Draw from so many of the likeliest tokens; 0: all.")]
Seed = Annotated[int, typer.Option(help="Of the draws; each prompt starts from it anew.")]
NumSamples = Annotated[int, typer.Option(help="Continuations of each prompt.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
AnyTokenizer = Annotated[
    bool, typer.Option("--any-tokenizer", help="Accept a tokenizer that is not the recorded one.")
]


def generate_command(
    load: Load,
    tokenizer_model: TokenizerModel,
    ckpt_step: CheckpointStep = None,
    eod_token: EodToken = None,
    prompt: Prompt = None,
    prompt_file: PromptFile = None,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = 0,
    num_samples: NumSamples = 1,
    as_json: AsJson = False,
    any_tokenizer: AnyTokenizer = False,
) -> None:
    """Continue text with a checkpoint, also of a run that still trains."""
    from megatron_mup.data.tokenizer import load_tokenizer
    from megatron_mup.generation import Sampling, load_model

    sampling = Sampling(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        num_samples=num_samples,
    )
    tokenizer = load_tokenizer(tokenizer_model, eod_token=eod_token)
    prompts = read_prompts(prompt or [], prompt_file)
    loaded = load_model(load, tokenizer, iteration=ckpt_step, any_tokenizer=any_tokenizer)
    typer.echo(f"{loaded.folder}, {loaded.model.dtype}, {loaded.model.device}", err=True)
    if as_json:
        typer.echo(json.dumps(report(loaded, prompts, sampling), indent=1, ensure_ascii=False))
    else:
        _print_texts(loaded, prompts, sampling)


def read_prompts(given: list[str], file: Path | None) -> list[str]:
    """The prompts: of the command line, then of the file, else all of stdin as one.

    Raises:
        ConfigError: the file cannot be read or holds no prompt.
    """
    if file is None:
        return given or [_from_stdin()]
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"cannot read --prompt-file {file} ({error}); it must be UTF-8 text with one prompt a "
            "line"
        ) from error
    prompts = [*given, *(line for line in lines if line.strip())]
    if not prompts:
        raise ConfigError(f"--prompt-file {file} holds no prompt; give one a line")
    return prompts


def _from_stdin() -> str:
    if sys.stdin.isatty():
        typer.echo("prompt, ended by Ctrl-D:", err=True)
    try:
        # A pipe ends with a line break that nobody meant as part of the text.
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"the prompt on stdin is not UTF-8 text ({error})") from error


def report(loaded: LoadedModel, prompts: list[str], sampling: Sampling) -> dict[str, Any]:
    """What ``--json`` prints."""
    from megatron_mup.generation import continue_prompt

    return {
        "checkpoint": str(loaded.folder),
        "iteration": loaded.iteration,
        "sampling": asdict(sampling),
        "samples": [
            {"prompt": prompt, **asdict(continuation)}
            for prompt in prompts
            for continuation in continue_prompt(loaded, prompt, sampling)
        ],
    }


def _print_texts(loaded: LoadedModel, prompts: list[str], sampling: Sampling) -> None:
    from megatron_mup.generation import continue_prompt

    live = sampling.num_samples == 1 and sys.stdout.isatty()
    several = len(prompts) * sampling.num_samples > 1
    for number, prompt in enumerate(prompts, start=1):
        if live:
            typer.echo(_heading(number, 1) * several + prompt, nl=False)
            continue_prompt(loaded, prompt, sampling, stream=_write)
            typer.echo()
            continue
        made: list[Continuation] = continue_prompt(loaded, prompt, sampling)
        for sample, continuation in enumerate(made, start=1):
            typer.echo(_heading(number, sample) * several + prompt + continuation.text)


def _heading(prompt: int, sample: int) -> str:
    return f"--- prompt {prompt}, sample {sample}\n"


def _write(text: str) -> None:
    typer.echo(text, nl=False)
