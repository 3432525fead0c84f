"""``megatron-mup campaign``: reads arguments, calls one function, prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_mup.errors import ConfigError
from megatron_mup.transfer.campaign.stage import Stage


def campaign_command(
    config: Annotated[Path, typer.Argument(help="YAML of the campaign.", metavar="CONFIG")],
    out: Annotated[Path, typer.Option("--out", help="Folder of all that it makes.")] = Path(
        "campaign"
    ),
    text: Annotated[
        list[Path] | None,
        typer.Option(
            "--text",
            help="Text or JSONL file; unset: the folder's own shards, or installed Python sources.",
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", help="Runs at a time; unset: one a GPU or a core.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", help="Of each run; unset: cores divided by workers.")
    ] = None,
    gpu_share: Annotated[int, typer.Option("--gpu-share", help="Runs that share a GPU.")] = 1,
    until: Annotated[
        str, typer.Option("--until", help=f"Last stage: {', '.join(Stage)}.")
    ] = "target",
) -> None:
    """Tune small, predict large; ends with 1 where a stage says stop, 75 if interrupted."""
    if until not in Stage:
        raise ConfigError(f"--until is '{until}'; use one of {', '.join(Stage)}")
    from megatron_mup.transfer.campaign.stages import CampaignRequest, run_campaign
    from megatron_mup.transfer.sweep.pool import share_of_machine

    request = CampaignRequest(
        config=config,
        out=out,
        text=tuple(text or ()),
        share=share_of_machine(workers, threads, gpu_share),
        until=Stage(until),
    )
    code = run_campaign(request, typer.echo)
    if code:
        raise typer.Exit(code)
