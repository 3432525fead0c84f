"""``megatron-mup data inspect``, ``verify`` and ``blend``: read arguments, print what was found."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Annotated

import typer

from megatron_mup.data.blend_plan import FREE_EPOCHS, BlendPart, plan_blend, write_blend
from megatron_mup.data.inspection import Inspection, LengthBin, inspect_prefix
from megatron_mup.data.preprocess_command import Overwrite, parse_count
from megatron_mup.data.tokenizer import load_tokenizer, read_model
from megatron_mup.data.verification import DamagedShardsError, ShardReport
from megatron_mup.data.verification import verify as verify_shards

_BAR = 40
_SHOWN_PLACES = 5
_SHOWN_PROBLEMS = 5


def inspect(
    prefix: Annotated[
        Path,
        typer.Argument(
            help="Shard, set of shards, or a job's output prefix; .bin and .idx may be left out.",
            metavar="PREFIX",
        ),
    ],
    tokenizer_model: Annotated[Path | None, typer.Option(help="Decodes the samples.")] = None,
    samples: Annotated[int, typer.Option(min=0, help="Documents to decode, drawn by --seed.")] = 3,
    seed: Annotated[int, typer.Option(help="Draws other samples.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Read shards and describe them: counts, lengths, samples, manifests."""
    tokenizer = load_tokenizer(tokenizer_model) if tokenizer_model else None
    found = inspect_prefix(prefix, tokenizer=tokenizer, samples=samples, seed=seed)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(found)))
    else:
        for line in _inspection_lines(found):
            typer.echo(line)
    if found.altered_files:
        raise DamagedShardsError(
            f"{found.altered_files[0]} is not the file that its manifest describes (SHA-256 "
            "differs); copy the shard again or preprocess with --overwrite"
        )


def _inspection_lines(found: Inspection) -> list[str]:
    ratio = ""
    if found.text_bytes is not None:
        ratio = f", {found.text_bytes / found.tokens:.3f} bytes/token"
    matches = {None: "no manifest", True: "matches", False: "DOES NOT MATCH"}
    lines = [
        f"{found.prefix}: {found.documents} documents, {found.tokens} tokens in "
        f"{_shards(found.shards)} ({found.dtype}{ratio})",
        f"tokens a document: mean {found.mean_document_tokens:.1f}, shortest "
        f"{found.min_document_tokens}, longest {found.max_document_tokens}",
        f"largest token id: {found.largest_token_id}",
        f"manifest: {matches[found.manifest_matches]}",
    ]
    if found.job is not None:
        lines += [
            f"split {split.name}: {split.documents} documents, {split.tokens} tokens, "
            f"{_shards(split.shards)}"
            for split in found.splits
        ]
        lines += _skipped_lines(found)
    lines += ["", f"{'tokens a document':>22}  {'documents':>12} {'tokens':>15}"]
    most = max(length_bin.documents for length_bin in found.histogram)
    lines += [_bin_line(length_bin, most) for length_bin in found.histogram]
    for sample in found.samples:
        lines += [
            "",
            f"document {sample.document} of {sample.shard} ({sample.tokens} tokens):",
            repr(sample.text),
        ]
    return lines


def _shards(count: int) -> str:
    return f"{count} shard" if count == 1 else f"{count} shards"


def _skipped_lines(found: Inspection) -> list[str]:
    job = found.job
    if job is None:
        return []
    rejected = ", ".join(f"{count} {why}" for why, count in job.rejected_documents.items())
    lines = [
        f"left out: {job.empty_documents} empty, {job.duplicate_documents} duplicates, "
        f"{rejected or '0 bad'}"
    ]
    lines += [f"  {place}" for place in job.rejected_places[:_SHOWN_PLACES]]
    if sum(job.rejected_documents.values()) > _SHOWN_PLACES:
        lines.append(f"  more places in {found.prefix}.manifest.json")
    return lines


def _bin_line(length_bin: LengthBin, most: int) -> str:
    span = f"{length_bin.shortest_tokens} - {length_bin.longest_tokens}"
    # At least a dot for every bin that is not empty.
    bar = "#" * round(_BAR * length_bin.documents / most) or "." * bool(length_bin.documents)
    return f"{span:>22}  {length_bin.documents:>12} {length_bin.tokens:>15}  {bar}".rstrip()


def verify(
    prefixes: Annotated[
        list[Path],
        typer.Argument(
            help="Shards, sets of shards, or output prefixes of jobs; .bin and .idx may be left "
            "out.",
            metavar="PREFIX",
        ),
    ],
    tokenizer_model: Annotated[
        Path | None, typer.Option(help="All shards must have been made with it.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that read shards.")] = 1,
) -> None:
    """Read every byte of shards and check it: hashes, index, ids, ends of documents."""
    # The digest alone is asked for, so that any kind of tokenizer will do.
    digest = hashlib.sha256(read_model(tokenizer_model)).hexdigest() if tokenizer_model else None
    reports = verify_shards(
        prefixes, tokenizer_sha256=digest, workers=workers, report=_print_report
    )
    damaged = [report for report in reports if report.problems]
    if damaged:
        raise DamagedShardsError(
            f"{len(damaged)} of {len(reports)} are damaged, first {damaged[0].problems[0]}"
        )


def _print_report(report: ShardReport) -> None:
    if not report.problems:
        unknown = "" if report.has_manifest else "; no manifest, so no hash to compare with"
        counts = f"{report.documents} documents, {report.tokens} tokens"
        typer.echo(f"OK      {report.name}: {counts}{unknown}")
        return
    for problem in report.problems[:_SHOWN_PROBLEMS]:
        typer.echo(f"DAMAGED {problem}")
    more = len(report.problems) - _SHOWN_PROBLEMS
    if more > 0:
        typer.echo(f"DAMAGED {report.name}: {more} more problems")


def blend(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="[WEIGHT] PREFIX...",
            help="Shards and sets; without weights all text is read equally often.",
        ),
    ],
    train_tokens: Annotated[str, typer.Option(help="Tokens of the whole run, e.g. 190B.")],
    output: Annotated[Path, typer.Option(help="The blend file (JSON).")],
    valid: Annotated[
        list[str] | None, typer.Option(help="Held-out shard or set; may be repeated.")
    ] = None,
    temperature: Annotated[
        float, typer.Option(help="Weights tokens^(1/T) where none are given.")
    ] = 1.0,
    expand_sets: Annotated[
        bool, typer.Option("--expand-sets", help="Write each shard, for Megatron-LM itself.")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Plan a blend by tokens and write it for data.per_split_data_args_path."""
    tokens = parse_count(train_tokens, "--train-tokens")
    parts = plan_blend(paths, train_tokens=tokens, temperature=temperature)
    write_blend(output, parts, valid=valid or (), expand_sets=expand_sets, overwrite=overwrite)
    for line in _blend_lines(parts):
        typer.echo(line)
    typer.echo(f"{output}: written; train with data.per_split_data_args_path={output}")
    if not all(Path(part.prefix).is_absolute() for part in parts):
        typer.echo("its prefixes are relative: train from this folder")


def _blend_lines(parts: list[BlendPart]) -> list[str]:
    width = max(len("set"), *(len(part.prefix) for part in parts))
    lines = [
        f"{'set':<{width}} {'shards':>7} {'tokens':>16} {'weight':>9} {'will be read':>16} "
        f"{'epochs':>8}"
    ]
    for part in parts:
        mark = " repeated" if part.epochs > 1 else ""
        if part.epochs > FREE_EPOCHS:
            mark += f", beyond {FREE_EPOCHS:g} epochs"
        lines.append(
            f"{part.prefix:<{width}} {part.shards:>7} {part.tokens:>16} {part.weight:>9.4f} "
            f"{part.train_tokens:>16.0f} {part.epochs:>8.2f}{mark}"
        )
    repeated = [part for part in parts if part.epochs > 1]
    if repeated:
        named = ", ".join(f"{part.prefix} {part.epochs:.3g} times" for part in repeated)
        lines.append(f"warning: the run will repeat data: {named}")
    if any(part.epochs > FREE_EPOCHS for part in parts):
        lines.append(
            f"up to {FREE_EPOCHS:g} epochs repeated text is nearly as good as new text, beyond it "
            "helps ever less: arXiv:2305.16264"
        )
    return lines
