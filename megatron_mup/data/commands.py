"""``megatron-mup data <verb>``: the verbs; each is in the module of what it is about."""

from __future__ import annotations

from typing import Any

import typer

from megatron_mup.command_help import PlainCommand
from megatron_mup.data.corpus_command import corpus_command
from megatron_mup.data.megatron_flags import own_arguments
from megatron_mup.data.preprocess_command import preprocess_command
from megatron_mup.data.shard_commands import blend, inspect, verify
from megatron_mup.data.tokenizer_command import tokenizer_command


class _PreprocessCommand(PlainCommand):
    """A command that takes Megatron-LM's flags as well."""

    # Before the parser, which would ask for options that are missing and stop at flags that it does
    # not know, without a word on what to do instead.
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, own_arguments(args))


app = typer.Typer(no_args_is_help=True, help="Tokenizers, token shards and blends of them.")
app.command("corpus", cls=PlainCommand)(corpus_command)
app.command("tokenizer", cls=PlainCommand)(tokenizer_command)
app.command("preprocess", cls=_PreprocessCommand)(preprocess_command)
app.command("inspect", cls=PlainCommand)(inspect)
app.command("verify", cls=PlainCommand)(verify)
app.command("blend", cls=PlainCommand)(blend)
