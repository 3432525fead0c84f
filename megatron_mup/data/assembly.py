"""Assembly: the finished units of a corpus become published shards.

Owns the order of it: plan (``shard_plan``), make every shard in the work folder (``shard_writer``),
several at a time, then publish the set (``shard_publication``). A run that was killed is continued
by the same call, which makes no shard twice. The output depends on the units and the request,
never on the number of workers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_mup.data.manifest import FORMAT_VERSION, JobManifest, ShardEntry
from megatron_mup.data.publication import check_writable
from megatron_mup.data.shard_plan import SPLITS, Extent, Plan, PlanRequest, plan_shards
from megatron_mup.data.shard_publication import (
    SHARD_SUFFIXES,
    begin_publication,
    begun_publication,
    existing_outputs,
    publish_shards,
    refuse_inputs_as_outputs,
    shard_name,
)
from megatron_mup.data.shard_writer import ShardTask, TokenizerFacts, finished_shard, write_shard
from megatron_mup.data.unit_files import UnitKey
from megatron_mup.data.worker_pool import run_in_workers
from megatron_mup.errors import DataError


@dataclass(frozen=True, kw_only=True)
class AssemblyRequest:
    """A corpus whose units are finished, and the shards that it is to become."""

    work: Path
    """The job's work folder; its units are in ``units``, the shards are made in ``shards``."""

    output_prefix: Path
    """Where the shards go, as the user named it."""

    keys: Sequence[UnitKey]
    """All units of the corpus, in order."""

    input_names: Sequence[str]
    """The input files by number, as they were named."""

    tokenizer_sha256: str
    """Hex digest of the tokenizer model file."""

    vocab_size: int
    """Number of ids of the tokenizer."""

    eod: int
    """Id of the end-of-document token."""

    append_eod: bool
    """Whether each document ends with ``eod``."""

    splits: Sequence[str]
    """Names of the splits to make, out of ``shard_plan.SPLITS``."""

    shard_tokens: int | None
    """Most tokens of a shard; None makes one shard of each split."""

    deduplicate: bool
    """Leave out exact copies of earlier documents."""

    options: dict[str, Any]
    """The options that decide the output; JSON values, for the job's manifest."""

    overwrite: bool
    """Replace the shards of an earlier job."""

    @property
    def tokenizer(self) -> TokenizerFacts:
        """What the shards say about the tokenizer."""
        return TokenizerFacts(
            sha256=self.tokenizer_sha256,
            vocab_size=self.vocab_size,
            eod=self.eod,
            append_eod=self.append_eod,
        )

    @property
    def plan(self) -> PlanRequest:
        """What decides which documents make which shard."""
        return PlanRequest(
            units=self.units,
            keys=self.keys,
            token_bytes=self.tokenizer.dtype.itemsize,
            splits=self.splits,
            shard_tokens=self.shard_tokens,
            marks=self.marks,
            inputs=self.input_names,
        )

    @property
    def units(self) -> Path:
        """Folder of the unit files."""
        return self.work / "units"

    @property
    def shards(self) -> Path:
        """Folder of the shards in the making."""
        return self.work / "shards"

    @property
    def marks(self) -> Path | None:
        """Where the copies of earlier documents are marked; None keeps copies."""
        return self.work / "duplicates" if self.deduplicate else None


def assemble(
    request: AssemblyRequest,
    *,
    workers: int,
    report: Callable[[int, int], None] | None = None,
) -> JobManifest:
    """Make the shards of a corpus and publish them.

    The work folder stays; whoever made it removes it.

    Args:
        request: The units and the wanted shards.
        workers: Processes that make shards; 1 works in this process.
        report: Called with the number of finished shards and of all shards.

    Returns:
        The job's manifest, as published.

    Raises:
        DataError: The output exists or cannot be written, a unit is damaged, or a split is empty.
    """
    try:
        manifest = begun_publication(request.work)
        if manifest is None:
            manifest = _make(request, workers, report or (lambda done, total: None))
            begin_publication(request.work, manifest)
        elif not _is_of(manifest, request):
            raise DataError(
                f"{request.work} holds the shards of a job with other options, published in part; "
                "run that job's command again to finish it, or delete the folder"
            )
        publish_shards(request.work, request.output_prefix, manifest)
    except OSError as error:
        raise DataError(
            f"cannot assemble {error.filename or request.work}: {error.strerror or error}; free "
            "space or mend the disk and run the same command again: it goes on where it ended"
        ) from error
    return manifest


def _is_of(manifest: JobManifest, request: AssemblyRequest) -> bool:
    wanted = (request.options, list(request.input_names), request.tokenizer_sha256)
    # Through JSON, which knows no tuples and no enumerations.
    found = (manifest.options, manifest.inputs, manifest.tokenizer_sha256)
    return bool(json.loads(json.dumps(wanted)) == list(found))


def _make(
    request: AssemblyRequest, workers: int, report: Callable[[int, int], None]
) -> JobManifest:
    """Make all shards in the work folder; nothing is published."""
    refuse_inputs_as_outputs(request.output_prefix, request.input_names)
    check_writable(
        existing_outputs(request.output_prefix),
        overwrite=request.overwrite,
        option="--output-prefix",
    )
    plan = plan_shards(request.plan)
    tasks = [
        _task(request, plan, split, number)
        for split in request.splits
        for number in range(len(plan.extents[split]))
    ]
    request.shards.mkdir(parents=True, exist_ok=True)
    entries = _make_shards(tasks, workers, report)
    made = iter(entries)
    return JobManifest(
        format_version=FORMAT_VERSION,
        options=request.options,
        inputs=list(request.input_names),
        tokenizer_sha256=request.tokenizer_sha256,
        vocab_size=request.vocab_size,
        eod=request.eod,
        empty_documents=plan.empty,
        duplicate_documents=plan.duplicates,
        rejected_documents=plan.rejected,
        rejected_places=plan.places,
        splits={name: list(islice(made, len(plan.extents[name]))) for name in request.splits},
    )


def _task(request: AssemblyRequest, plan: Plan, split: str, number: int) -> ShardTask:
    extents = plan.extents[split]
    extent: Extent = extents[number]
    keys = tuple(request.keys[extent.first_unit : extent.last_unit + 1])
    # A unit of text files spans several inputs, up to those of the next unit.
    following = request.keys[extent.last_unit + 1 : extent.last_unit + 2]
    last_input = following[0].source if following else len(request.input_names)
    first_input = keys[0].source
    return ShardTask(
        folder=request.shards,
        name=shard_name(
            request.output_prefix,
            split if len(request.splits) > 1 else None,
            number,
            None if request.shard_tokens is None else len(extents),
        ),
        units=request.units,
        keys=keys,
        split=SPLITS.index(split),
        first_row=extent.first_row,
        stop_row=extent.stop_row,
        first_document=plan.first_documents[extent.first_unit],
        documents=extent.documents,
        tokens=extent.tokens,
        marks=request.marks,
        inputs=tuple(request.input_names[first_input : last_input + 1]),
        first_input=first_input,
        tokenizer=request.tokenizer,
    )


def _make_shards(
    tasks: Sequence[ShardTask], workers: int, report: Callable[[int, int], None]
) -> list[ShardEntry]:
    """Make the shards that an earlier run left to do; return the entries of all, in order."""
    entries = {task.name: entry for task in tasks if (entry := finished_shard(task)) is not None}
    _remove_others(tasks, entries.keys())
    left = [task for task in tasks if task.name not in entries]
    report(len(entries), len(tasks))
    for entry in _made(left, min(workers, len(left))):
        entries[entry.name] = entry
        report(len(entries), len(tasks))
    return [entries[task.name] for task in tasks]


def _remove_others(tasks: Sequence[ShardTask], finished: Collection[str]) -> None:
    """Delete what is no part of a finished shard: a half-made shard may be as large as the disk."""
    wanted = {f"{name}{suffix}" for name in finished for suffix in SHARD_SUFFIXES}
    for path in tasks[0].folder.iterdir():
        if path.name not in wanted:
            path.unlink()


def _made(tasks: Sequence[ShardTask], workers: int) -> Iterator[ShardEntry]:
    """Make shards and yield their entries as they come."""
    if workers <= 1:
        yield from map(write_shard, tasks)
        return
    yield from run_in_workers(write_shard, tasks, workers=workers)
