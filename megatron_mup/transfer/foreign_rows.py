"""Runs from a CSV table that another program wrote: its columns are named, its lines judged.

Owns which lines of such a table are runs. A line without a loss is none. A line that repeats
another's run is counted once, because a run that is there twice looks like a repeat without noise;
what may or may not be a repeat is refused, or said. Must not import torch or megatron.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mup.errors import DataError
from megatron_mup.transfer.runs import AXES, Row, Status, look_like_rates

_KNOWN = ("loss", "lr", "log2_lr", "size", *AXES, "arm", "seed", "steps", "seconds", "parameters")

_SHOWN = 6
"""Lines that are named one by one."""


@dataclass(frozen=True, kw_only=True)
class ForeignTable:
    """What a table of another program holds.

    Attributes:
        rows: its runs.
        notes: which of its lines are no run, or the same run once more, in words.
        seeds_known: it has a column of seeds.
    """

    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    seeds_known: bool


_Record = tuple[int, dict[str, str]]
"""A line's number in the file, as an editor counts, and its values by column."""


@dataclass(frozen=True)
class _Line:
    """One line of the table and its run."""

    number: int
    row: Row


def read_foreign(path: Path, mapping: Mapping[str, str]) -> ForeignTable:
    """Runs of a CSV table that another program wrote, such as wandb's export.

    A loss that is ``nan`` or infinite (in any case) is a diverged run; without a loss a line is no
    run. Without a seed column, lines of one arm, size and learning rate are repeats of each other,
    unless their losses are equal: then they are one run.

    Args:
        path: the table.
        mapping: what -> its column. Needed are a size (``width``, ``depth``, ``batch`` or
            ``tokens``; ``size`` if it is none of them), ``lr`` or ``log2_lr``, and ``loss``; known
            are ``arm``, ``seed``, ``steps``, ``seconds`` and ``parameters``.

    Returns:
        One row a run; without the column the arm is "runs" and the seed 1.

    Raises:
        DataError: the table or a column is missing, a value is no number, no line has a loss, a
            learning rate is not of the kind that its column is said to be, or lines of one seed
            differ in their loss.
    """
    _check_mapping(mapping)
    records = _records(path, mapping)
    recorded = [record for record in records if _text(record[1], mapping["loss"])]
    unrecorded = [record for record in records if not _text(record[1], mapping["loss"])]
    if records and not recorded:
        raise DataError(
            f"{path} has no loss in the column '{mapping['loss']}' on any of its {len(records)} "
            "lines; name the column of final losses with --column loss=NAME"
        )
    _check_rates(path, recorded, mapping)
    lines = [_line(path, record, mapping) for record in recorded]
    seeds_known = "seed" in mapping
    kept = _once(path, lines, seeds_known=seeds_known)
    notes = _unrecorded_note(unrecorded, mapping)
    notes += _repeats_note(lines, kept, seeds_known=seeds_known)
    return ForeignTable(
        rows=tuple(line.row for line in kept), notes=tuple(notes), seeds_known=seeds_known
    )


def _check_mapping(mapping: Mapping[str, str]) -> None:
    unknown = [name for name in mapping if name not in _KNOWN]
    if unknown:
        raise DataError(
            f"--column {unknown[0]}=...: '{unknown[0]}' is not known; use {', '.join(_KNOWN)}"
        )
    for kind, names in {
        "a size": ("size", *AXES),
        "a learning rate": ("lr", "log2_lr"),
        "the loss": ("loss",),
    }.items():
        given = [name for name in names if name in mapping]
        if len(given) != 1:
            raise DataError(
                f"{kind} must be given once as --column {names[0]}=NAME"
                + (f" (or {', '.join(names[1:])})" if names[1:] else "")
                + f"; given: {', '.join(given) or 'none'}"
            )


def _records(path: Path, mapping: Mapping[str, str]) -> list[_Record]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = list(reader.fieldnames or [])
            missing = [name for name in mapping.values() if name not in columns]
            if missing:
                raise DataError(
                    f"{path} has no column '{missing[0]}'; it has {', '.join(columns)}; correct "
                    "--column"
                )
            return [(reader.line_num, values) for values in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read the table '{path}': {error}; give a CSV file") from error


def _text(values: Mapping[str, str | None], column: str) -> str:
    """A value without blanks around it; empty where a short line lacks it."""
    return (values[column] or "").strip()


def _number(
    values: Mapping[str, str], mapping: Mapping[str, str], name: str, *, origin: str
) -> float:
    """A value; only a loss may be none or infinite, of a run that diverged."""
    text = _text(values, mapping[name])
    try:
        number = float(text)
    except ValueError as error:
        raise DataError(f"{origin}: {name} ('{mapping[name]}') is {text!r}, no number") from error
    if name != "loss" and not math.isfinite(number):
        raise DataError(f"{origin}: {name} ('{mapping[name]}') is {text!r}, not finite")
    return number


def _check_rates(path: Path, records: Sequence[_Record], mapping: Mapping[str, str]) -> None:
    """Refuse logarithms that are said to be learning rates, and learning rates to be logarithms."""
    name = "lr" if "lr" in mapping else "log2_lr"
    column = mapping[name]
    found = [
        (number, _number(values, mapping, name, origin=f"{path}, line {number}"))
        for number, values in records
    ]
    if name == "log2_lr":
        rates = [rate for _, rate in found]
        if look_like_rates(rates):
            raise DataError(
                f"{path}: log2_lr ('{column}') goes from {min(rates):g} to {max(rates):g}, as "
                f"learning rates do and not their log2; give --column lr={column}"
            )
    hint = ""
    if any(rate < 0 for _, rate in found):
        hint = f"; if '{column}' is log2 of learning rates, give --column log2_lr={column}"
    for number, rate in found:
        if name == "lr" and rate <= 0:
            raise DataError(
                f"{path}, line {number}: the learning rate is {rate}; it must be positive{hint}"
            )


def _line(path: Path, record: _Record, mapping: Mapping[str, str]) -> _Line:
    line, values = record
    origin = f"{path}, line {line}"

    def number(name: str, default: float = 0.0) -> float:
        return _number(values, mapping, name, origin=origin) if name in mapping else default

    size = next(name for name in ("size", *AXES) if name in mapping)
    loss = number("loss") if _text(values, mapping["loss"]) else math.nan
    # Every line has an identity of its own: repeated runs need not name their seeds.
    digest = hashlib.sha256(json.dumps([origin, dict(values)]).encode()).hexdigest()
    found = {
        "sweep": str(path),
        "cell": digest[:12],
        "config_sha256": digest,
        "arm": values[mapping["arm"]] if "arm" in mapping else "runs",
        "axis": "width" if size == "size" else size,
        "size": number(size),
        "log2_lr": number("log2_lr") if "log2_lr" in mapping else math.log2(number("lr")),
        "seed": int(number("seed", 1)),
        "status": Status.FINISHED if math.isfinite(loss) else Status.DIVERGED,
        "validation_loss": loss if math.isfinite(loss) else math.nan,
        "steps": int(number("steps")),
        "planned_steps": int(number("steps")),
        "tokens": int(number("tokens")),
        "parameters": int(number("parameters")),
        "seconds": number("seconds"),
    }
    return _Line(line, Row(**{**_UNKNOWN, **found}))


_UNKNOWN: dict[str, Any] = {
    "settings": {},
    "train_loss": math.nan,
    "non_embedding_parameters": 0,
    "validation_tokens": 0,
    "loss_spikes": 0,
    **dict.fromkeys(("data_sha256", "commit", "version", "torch"), ""),
    **dict.fromkeys(("megatron_core", "machine", "started"), ""),
}


def _once(path: Path, lines: Sequence[_Line], *, seeds_known: bool) -> list[_Line]:
    """Each run once.

    Raises:
        DataError: lines of one arm, size, learning rate and seed differ in their loss.
    """
    kept: dict[tuple[object, ...], _Line] = {}
    for line in lines:
        row = line.row
        # Losses of different seeds do not agree to their last digit; "diverged" always does.
        loss = repr(row.validation_loss) if math.isfinite(row.validation_loss) else line.number
        key = row.arm, row.size, row.log2_lr, row.seed if seeds_known else loss
        other = kept.setdefault(key, line)
        if seeds_known and repr(other.row.validation_loss) != repr(row.validation_loss):
            raise DataError(
                f"{path}, lines {other.number} and {line.number} are both arm {row.arm}, "
                f"{row.axis} {row.size:g}, log2 LR {row.log2_lr:g}, seed {row.seed}, with losses "
                f"{_loss_text(other.row)} and {_loss_text(row)}; remove what is no final loss, or "
                "name a column that tells the runs apart: --column seed=NAME or --column arm=NAME"
            )
    return list(kept.values())


def _loss_text(row: Row) -> str:
    return "diverged" if row.status is Status.DIVERGED else f"{row.validation_loss:g}"


def _unrecorded_note(records: Sequence[_Record], mapping: Mapping[str, str]) -> list[str]:
    if not records:
        return []
    size = next(name for name in ("size", *AXES) if name in mapping)
    rate = "lr" if "lr" in mapping else "log2_lr"
    named = [
        f"line {number} ({size} {_text(values, mapping[size])}, {rate} "
        f"{_text(values, mapping[rate])})"
        for number, values in records
    ]
    count = (
        "1 line of the table has" if len(named) == 1 else f"{len(named)} lines of the table have"
    )
    return [
        f"{count} no loss in the column '{mapping['loss']}' and no part in the report: "
        f"{_first(named)}"
    ]


def _repeats_note(lines: Sequence[_Line], kept: Sequence[_Line], *, seeds_known: bool) -> list[str]:
    numbers = {line.number for line in kept}
    named = [
        f"line {line.number} ({line.row.axis} {line.row.size:g}, log2 LR {line.row.log2_lr:.4g})"
        for line in lines
        if line.number not in numbers
    ]
    if not named:
        return []
    same, cure = "arm, size, learning rate, seed and loss", ""
    if not seeds_known:
        same = "arm, size, learning rate and loss"
        cure = "; if they are runs of other seeds, name their column with --column seed=NAME"
    words = ("1 line of the table repeats", "is")
    if len(named) > 1:
        words = (f"{len(named)} lines of the table repeat", "are")
    return [
        f"{words[0]} an earlier one in {same}, and {words[1]} counted once: {_first(named)}{cure}"
    ]


def _first(named: Sequence[str]) -> str:
    """Some of many lines, and how many more there are."""
    more = len(named) - _SHOWN
    return ", ".join(named[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
