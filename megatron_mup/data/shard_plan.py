"""The plan of the shards: which documents make which shard.

Owns the law that cuts a corpus into shards. In the corpus's order, and for each split alone, a
shard takes documents until the next one would bring it above the wanted size; a document that is
larger than this by itself gets a shard of its own, and documents without ids join the shard before.
So each shard holds ids. The units' rows stream by; of them only the shards' limits stay in memory.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_mup.data.duplicates import mark_duplicates, read_marks
from megatron_mup.data.unit_files import ROW, SUMS, Unit, UnitFacts, UnitKey, read_unit
from megatron_mup.errors import DataError

logger = logging.getLogger(__name__)

SPLITS = ("train", "valid", "test")
"""Names of the splits by the numbers that ``unit_files.ROW`` holds."""

KEPT_PLACES = 100
"""Places of bad documents that a job's manifest names."""

_MOST_SHARDS = 99999


@dataclass(frozen=True)
class Extent:
    """The documents of a shard: those of its split, without copies, in a range of rows."""

    first_unit: int
    """Number of the unit that holds the first document."""

    first_row: int
    """Row of the first document in its unit."""

    last_unit: int
    """Number of the unit that holds the last document."""

    stop_row: int
    """The row after the last document in its unit."""

    documents: int
    tokens: int


@dataclass
class Plan:
    """What a corpus becomes."""

    extents: dict[str, list[Extent]]
    """The shards of each split, in order; none for a held-out split without documents."""

    first_documents: list[int] = field(default_factory=list)
    """Number, in the corpus, of each unit's first row."""

    duplicates: int = 0
    """Copies of earlier documents, left out."""

    empty: int = 0
    """Documents without text, left out."""

    rejected: dict[str, int] = field(default_factory=dict)
    """Bad documents left out, by reason."""

    places: list[str] = field(default_factory=list)
    """The first of them: FILE:LINE, reason and detail."""


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """What a plan depends on."""

    units: Path
    """Folder of the unit files."""

    keys: Sequence[UnitKey]
    """All units of the corpus, in order."""

    token_bytes: int
    """Bytes of an id."""

    splits: Sequence[str]
    """Names of the splits to make, out of ``SPLITS``."""

    shard_tokens: int | None
    """Most tokens of a shard; None makes one shard of each split."""

    marks: Path | None
    """Where to mark the copies of earlier documents; None keeps them."""

    inputs: Sequence[str]
    """Names of the input files by number."""


def plan_shards(request: PlanRequest) -> Plan:
    """Read all units' rows and decide which documents make which shard.

    Args:
        request: The units and the wanted shards.

    Returns:
        The plan; it depends on nothing but the request and the units' contents.

    Raises:
        DataError: A unit is damaged, no document is left for training, or there are too many
            shards.
    """
    plan = Plan({name: [] for name in request.splits})
    if request.marks is not None:
        documents = sum(_row_count(request.units, key) for key in request.keys)
        digests = (unit.rows["digest"] for _, unit in _units(request))
        plan.duplicates = mark_duplicates(digests, request.marks, documents=documents)
    packers = {
        SPLITS.index(name): _Packer(plan.extents[name], request.shard_tokens)
        for name in request.splits
    }
    lines = _LinesBefore()
    document = 0
    for number, (key, unit) in enumerate(_units(request)):
        plan.first_documents.append(document)
        _count(plan, key, unit.facts, lines=lines, inputs=request.inputs)
        kept = np.ones(len(unit.rows), dtype=np.bool_)
        if request.marks is not None:
            kept = ~read_marks(request.marks, document, len(unit.rows))
        document += len(unit.rows)
        _pack(packers, number, unit, kept)
    for packer in packers.values():
        packer.close()
    _check_extents(plan)
    return plan


class _Packer:
    """Cuts the documents of one split into shards."""

    def __init__(self, extents: list[Extent], shard_tokens: int | None) -> None:
        self._extents = extents
        self._limit = np.iinfo(np.int64).max if shard_tokens is None else shard_tokens
        self._first = self._last = (0, 0)
        self._documents = self._tokens = 0

    def add(self, unit: int, rows: NDArray[np.int64], lengths: NDArray[np.int32]) -> None:
        """Append documents of one unit: their row numbers and their lengths in tokens."""
        ends = np.cumsum(lengths, dtype=np.int64)
        taken = before = 0
        while taken < len(rows):
            room = max(self._limit - self._tokens, 0)
            # No further than the room goes; the limit of "no limit" must not overflow.
            reach = min(before + room, int(ends[-1]))
            fit = int(np.searchsorted(ends, reach, side="right"))
            if fit == taken and self._tokens:
                self.close()
                continue
            fit = max(fit, taken + 1)
            if not self._documents:
                self._first = (unit, int(rows[taken]))
            self._last = (unit, int(rows[fit - 1]) + 1)
            self._documents += fit - taken
            self._tokens += int(ends[fit - 1]) - before
            taken, before = fit, int(ends[fit - 1])

    def close(self) -> None:
        """End the current shard, if it holds any id."""
        if self._tokens:
            self._extents.append(Extent(*self._first, *self._last, self._documents, self._tokens))
            self._documents = self._tokens = 0


class _LinesBefore:
    """Lines of an input file before a unit, as the units come by in order."""

    def __init__(self) -> None:
        self._source, self._lines = -1, 0

    def add(self, key: UnitKey, lines: int) -> int:
        """Count a unit; returns the lines of its file that lie before it."""
        if key.source != self._source:
            self._source, self._lines = key.source, 0
        before = self._lines
        self._lines += lines
        return before


def _units(request: PlanRequest) -> Iterator[tuple[UnitKey, Unit]]:
    for key in request.keys:
        yield key, read_unit(request.units, key, token_bytes=request.token_bytes)


def _row_count(folder: Path, key: UnitKey) -> int:
    """Rows of a unit by its file's size; ``read_unit`` checks the rest."""
    path = folder / f"{key.name}.unit"
    with path.open("rb") as stream:
        stream.seek(SUMS.size)
        return (path.stat().st_size - SUMS.size - len(stream.readline())) // ROW.itemsize


def _pack(packers: dict[int, _Packer], number: int, unit: Unit, kept: NDArray[np.bool_]) -> None:
    split_of = unit.rows["split"]
    foreign = sorted(set(np.unique(split_of).tolist()) - packers.keys())
    if foreign:
        raise DataError(
            f"{unit.tokens_path}: documents of split {foreign[0]}, which this job does not make: "
            "the units are of another job; delete the work folder and run the command again"
        )
    for split, packer in packers.items():
        rows = np.flatnonzero(kept & (split_of == split))
        packer.add(number, rows, unit.rows["length"][rows])


def _count(
    plan: Plan, key: UnitKey, facts: UnitFacts, *, lines: _LinesBefore, inputs: Sequence[str]
) -> None:
    plan.empty += facts.empty_documents
    for reason, count in facts.rejected.items():
        plan.rejected[reason] = plan.rejected.get(reason, 0) + count
    before = lines.add(key, facts.lines)
    for file, _, line, reason, detail in facts.rejected_places:
        # A later file of a unit of text files is one document that begins at its line 1.
        number = before + line + 1 if file == key.source else 1
        if len(plan.places) < KEPT_PLACES:
            plan.places.append(f"{inputs[file]}:{number}: {reason}: {detail}")


def _check_extents(plan: Plan) -> None:
    plan.rejected = dict(sorted(plan.rejected.items()))
    left_out = f"{plan.empty} were empty, {plan.duplicates} copies of others"
    if plan.rejected:
        left_out += f", {sum(plan.rejected.values())} bad"
    for name, extents in plan.extents.items():
        if not extents and name == SPLITS[0]:
            # The finished units are kept: any other command than the same needs --overwrite.
            if not any(plan.extents.values()):
                raise DataError(
                    f"the inputs hold no document with text ({left_out}); pass other --input, and "
                    "--overwrite"
                )
            raise DataError(
                f"no document for the split {name}: all are held out ({left_out}); pass more "
                "--input, or --valid-fraction 0 and --test-fraction 0 for no held-out split, and "
                "--overwrite"
            )
        if not extents:
            # Not an error: all the work is done, and the hash decides, not the user.
            logger.warning(
                "no document fell into the split %s (%s): it is LEFT OUT, and the manifest lists "
                "it without shards; for a held-out split pass more --input or a larger "
                "--%s-fraction",
                name,
                left_out,
                name,
            )
        if len(extents) > _MOST_SHARDS:
            raise DataError(
                f"{len(extents)} shards of the split {name}, names hold {_MOST_SHARDS}; pass a "
                "larger --shard-tokens"
            )
