"""Shard sets: shards that are named and read as one.

A set of n shards with the prefix P is ``P-00000-of-0000n`` to ``P-0000m-of-0000n`` with m = n - 1,
in the order of the corpus. Wherever a shard's prefix is expected, a set's may stand. Must not
import torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from megatron_mup.data.manifest import JobManifest
from megatron_mup.data.shards import ShardInfo, open_shard, token_count
from megatron_mup.errors import DataError

_MEMBER = re.compile(r"(?P<stem>.+)-(?P<number>\d{5,})-of-(?P<count>\d{5,})")
_NAMED_HOLES = 3


@dataclass(frozen=True, kw_only=True)
class SetInfo:
    """A shard or a set whose shards were all found whole."""

    prefix: Path
    """The name that stands for all of them."""

    documents: int
    """Documents of all shards."""

    tokens: int
    """Token ids of all shards."""

    shards: tuple[ShardInfo, ...]
    """The shards in order."""


def member_name(prefix: Path, number: int, count: int) -> Path:
    """Prefix of one shard of a set.

    Args:
        prefix: The set's prefix.
        number: Which shard, from 0.
        count: How many there are.
    """
    return prefix.with_name(f"{prefix.name}-{number:05d}-of-{count:05d}")


def expand(prefix: Path) -> list[Path]:
    """The shards that a prefix names.

    Args:
        prefix: Of a shard or of a set.

    Returns:
        The shards' prefixes in order. A prefix of which there is no file is returned as it is:
        ``open_shard`` says what is missing.

    Raises:
        DataError: A set has holes, there are two sets, or a set and a shard, of this name.
    """
    numbers = _members(prefix)
    if not numbers:
        return [prefix]
    # Never guessed: training on the wrong one of two would not be noticed.
    if _exists(prefix):
        raise DataError(
            f"{prefix} is a shard, and {len(next(iter(numbers.values())))} shards "
            f"{prefix}-NUMBER-of-COUNT exist as well; delete or rename one of the two"
        )
    if len(numbers) > 1:
        counts = ", ".join(f"{prefix.name}-*-of-{count:05d}" for count in sorted(numbers))
        raise DataError(
            f"{prefix} names several sets of shards ({counts}); delete those of the other run"
        )
    ((count, found),) = numbers.items()
    missing = [number for number in range(count) if number not in found]
    if missing or len(found) != count:
        named = ", ".join(str(member_name(prefix, x, count)) for x in missing[:_NAMED_HOLES])
        more = f" and {len(missing) - _NAMED_HOLES} more" if len(missing) > _NAMED_HOLES else ""
        raise DataError(
            f"the set {prefix} has {len(found)} of {count} shards; missing: {named}{more}; copy "
            "them, or run `megatron-mup data preprocess` to its end"
        )
    return [member_name(prefix, number, count) for number in range(count)]


def job_shards(output_prefix: Path, job: JobManifest) -> dict[str, list[Path]]:
    """The shards of a whole job by split.

    Args:
        output_prefix: The job's output prefix; its manifest lies beside the shards.
        job: The manifest.
    """
    return {
        split: [output_prefix.with_name(entry.name) for entry in entries]
        for split, entries in job.splits.items()
    }


def set_tokens(prefix: Path) -> int:
    """Token ids of a shard or set by the sizes of its files.

    Raises:
        DataError: As ``expand``, or a file is missing.
    """
    return sum(token_count(shard) for shard in expand(prefix))


def set_info(prefix: Path, *, vocab_size: int | None = None) -> SetInfo:
    """Open every shard of a set.

    Args:
        prefix: Of a shard or of a set.
        vocab_size: Rows of the model's embedding; None leaves the ids unchecked.

    Raises:
        DataError: As ``expand`` and ``open_shard``, or the shards differ in type or tokenizer.
    """
    shards = tuple(open_shard(shard, vocab_size=vocab_size) for shard in expand(prefix))
    first = shards[0]
    for shard in shards[1:]:
        if _make(shard) != _make(first):
            raise DataError(
                f"{shard.prefix} and {first.prefix} are of one set, but of different tokenizers or "
                "integer types; make the set again with `megatron-mup data preprocess --overwrite`"
            )
    return SetInfo(
        prefix=prefix,
        documents=sum(shard.documents for shard in shards),
        tokens=sum(shard.tokens for shard in shards),
        shards=shards,
    )


def _make(shard: ShardInfo) -> tuple[str, str | None]:
    return shard.dtype, shard.manifest.tokenizer_sha256 if shard.manifest else None


def _exists(prefix: Path) -> bool:
    return any(Path(f"{prefix}{suffix}").is_file() for suffix in (".bin", ".idx"))


def _members(prefix: Path) -> dict[int, set[int]]:
    """Count in the name -> the numbers of which an .idx file is there."""
    numbers: dict[int, set[int]] = {}
    # Listed and matched rather than globbed: a prefix may hold *, ? and brackets.
    for path in prefix.parent.iterdir() if prefix.parent.is_dir() else ():
        if path.suffix != ".idx" or not path.name.startswith(f"{prefix.name}-"):
            continue
        match = _MEMBER.fullmatch(path.stem)
        if match and match["stem"] == prefix.name:
            numbers.setdefault(int(match["count"]), set()).add(int(match["number"]))
    return numbers
