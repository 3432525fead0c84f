"""``megatron-mup data <verb>``: the verbs; each is in the module of what it is about."""

from __future__ import annotations

import typer

from megatron_mup.data.preprocess_command import preprocess_command
from megatron_mup.data.shard_commands import blend, inspect, verify
from megatron_mup.data.tokenizer_command import tokenizer_command

app = typer.Typer(no_args_is_help=True, help="Tokenizers, token shards and blends of them.")
app.command("tokenizer")(tokenizer_command)
app.command("preprocess")(preprocess_command)
app.command("inspect")(inspect)
app.command("verify")(verify)
app.command("blend")(blend)
