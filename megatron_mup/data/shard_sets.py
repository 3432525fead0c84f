"""Shard sets: shards that are named and read as one.

A set of n shards with the prefix P is ``P-00000-of-0000n`` to ``P-0000m-of-0000n`` with m = n - 1,
in the order of the corpus. Wherever a shard's prefix is expected, a set's may stand. Owns what a
user may write for a prefix, and what is said where there are no such shards. Must not import torch.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megatron_mup.data.manifest import JobManifest, job_manifest_path
from megatron_mup.data.shards import ShardInfo, open_shard, token_count
from megatron_mup.errors import DataError

_MEMBER = re.compile(r"(?P<stem>.+)-(?P<number>\d{5,})-of-(?P<count>\d{5,})")
_NAMED_HOLES = 3
_NAMED_PREFIXES = 3
_SIMILARITY = 0.8
_SUFFIXES = (".bin", ".idx", ".manifest.json", ".json")
_SPLIT = re.compile(r"_(train|valid|test)$")


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


def named_prefix(named: Path) -> Path:
    """The prefix that a user means.

    Args:
        named: A prefix of a shard, a set or a whole job, or one of their files.

    Returns:
        The prefix; of it there is at least one file.

    Raises:
        DataError: There is none; the message says what there is instead.
    """
    if _is_there(named):
        return named
    for suffix in _SUFFIXES:
        if named.name.endswith(suffix) and _is_there(prefix := _without(named, suffix)):
            return prefix
    prefix = next((_without(named, end) for end in _SUFFIXES if named.name.endswith(end)), named)
    if named.is_dir():
        raise DataError(
            f"{named} is a folder; name the shards in it by their prefix"
            f"{_listed(named / name for name in _prefixes(named))}"
        )
    if not prefix.parent.is_dir():
        raise DataError(f"the folder {prefix.parent} does not exist; correct the shards' prefix")
    for job in (prefix, prefix.with_name(_SPLIT.sub("", _stem(prefix.name)))):
        if Path(f"{job}.work").is_dir() and not job_manifest_path(job).exists():
            raise DataError(
                f"the job {job} is not finished: its work so far is in {job}.work; run the same "
                "`megatron-mup data preprocess` command again to finish it"
            )
    there = _prefixes(prefix.parent)
    close = [name for name in there if name.startswith(f"{prefix.name}_")]
    close += difflib.get_close_matches(prefix.name, there, cutoff=_SIMILARITY)
    raise DataError(
        f"there are no shards {prefix}: no {prefix.name}.bin or .idx, nor a set or a job of this "
        f"name; correct the prefix{_listed(prefix.with_name(name) for name in close or there)}"
    )


def _without(path: Path, suffix: str) -> Path:
    return path.with_name(path.name.removesuffix(suffix) or path.name)


def _is_there(prefix: Path) -> bool:
    """Whether a shard, a set or a whole job has this prefix."""
    return bool(prefix.name) and (
        _exists(prefix) or job_manifest_path(prefix).is_file() or bool(_members(prefix))
    )


def _stem(name: str) -> str:
    """The name of the set that a shard belongs to."""
    match = _MEMBER.fullmatch(name)
    return match["stem"] if match else name


def _prefixes(folder: Path) -> list[str]:
    """The prefixes of the shards and sets in a folder, sorted."""
    return sorted({_stem(path.stem) for path in folder.iterdir() if path.suffix == ".idx"})


def _listed(prefixes: Iterable[Path]) -> str:
    """The end of a message: the first of some prefixes."""
    names = [str(prefix) for prefix in dict.fromkeys(prefixes)]
    if not names:
        return "; no shards are there"
    more = f" and {len(names) - _NAMED_PREFIXES} more" if len(names) > _NAMED_PREFIXES else ""
    return f"; there are {', '.join(names[:_NAMED_PREFIXES])}{more}"


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
