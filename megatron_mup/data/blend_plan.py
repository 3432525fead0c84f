"""Planning a blend: what each set gives to a token budget, and the file that training reads.

Must not import torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_mup.data.blend import expand_blend, parse_blend
from megatron_mup.data.manifest import job_manifest_path, read_job_manifest
from megatron_mup.data.publication import check_writable, explained_failure, publish_text
from megatron_mup.data.shard_sets import SetInfo, expand, named_prefix, set_info
from megatron_mup.data.shards import check_one_tokenizer
from megatron_mup.errors import DataError

FREE_EPOCHS = 4.0
"""Repeating text up to so often is nearly as good as new text: arXiv:2305.16264, Section 1."""


@dataclass(frozen=True, kw_only=True)
class BlendPart:
    """What one shard or set gives."""

    prefix: str
    """Of the shard or set."""

    shards: int
    """Number of shards."""

    tokens: int
    """Token ids it holds."""

    weight: float
    """Share of the blend; those of all parts add up to 1."""

    train_tokens: float
    """Token ids that the run will read of it."""

    @property
    def epochs(self) -> float:
        """How often the run reads each of its tokens; above 1, documents are repeated."""
        return self.train_tokens / self.tokens


def plan_blend(
    paths: Sequence[str], *, train_tokens: int, temperature: float = 1.0
) -> list[BlendPart]:
    """Work out a blend.

    Args:
        paths: Prefixes of shards and sets, or weights and prefixes in turn.
        train_tokens: Token ids that the run will read in all.
        temperature: T of the weights tokens^(1/T) where none are given; 1 reads all text equally
            often, more brings small sets forward.

    Returns:
        The parts in the order of ``paths``.

    Raises:
        DataError: A shard is missing or damaged, named twice, or a number does not fit.
    """
    prefixes, weights = parse_blend(paths)
    _check_plan(prefixes, weights, train_tokens=train_tokens, temperature=temperature)
    infos = [_blended(prefix) for prefix in prefixes]
    prefixes = [str(info.prefix) for info in infos]
    _owners(prefixes)
    check_one_tokenizer(shard for info in infos for shard in info.shards)
    if weights is None:
        # Relative to the largest, because a power of billions of tokens overflows.
        largest = max(info.tokens for info in infos)
        weights = [(info.tokens / largest) ** (1.0 / temperature) for info in infos]
    return [
        BlendPart(
            prefix=prefix,
            shards=len(info.shards),
            tokens=info.tokens,
            weight=weight / sum(weights),
            train_tokens=train_tokens * weight / sum(weights),
        )
        for prefix, info, weight in zip(prefixes, infos, weights, strict=True)
    ]


def _check_plan(
    prefixes: list[str], weights: list[float] | None, *, train_tokens: int, temperature: float
) -> None:
    if not prefixes:
        raise DataError("no shards to blend; pass their prefixes, or weights and prefixes in turn")
    if len(set(prefixes)) < len(prefixes):
        twice = next(prefix for prefix in prefixes if prefixes.count(prefix) > 1)
        raise DataError(f"{twice} is named twice; add up its weights")
    if train_tokens < 1:
        raise DataError(f"--train-tokens is {train_tokens}; it must be at least 1")
    if not 0 < temperature < float("inf"):
        raise DataError(f"--temperature is {temperature}; it must be positive")
    if weights is not None and temperature != 1.0:
        raise DataError("--temperature makes weights, and weights are given; leave out one of them")


def write_blend(
    output: Path,
    parts: Sequence[BlendPart],
    *,
    valid: Sequence[str] = (),
    expand_sets: bool = False,
    overwrite: bool = False,
) -> None:
    """Publish a blend file for data.per_split_data_args_path.

    Args:
        output: The file.
        parts: The training blend.
        valid: Prefixes of held-out shards and sets, or weights and prefixes in turn.
        expand_sets: Write the shards of sets one by one, for Megatron-LM, which knows no sets.
        overwrite: Replace an existing file.

    Raises:
        DataError: The file exists or cannot be written, or a held-out shard is missing or is
            trained on.
    """
    check_writable([output], overwrite=overwrite, option="--output")
    train = _in_turn([part.weight for part in parts], [part.prefix for part in parts])
    named, weights = parse_blend(valid)
    held_out = [str(_blended(prefix).prefix) for prefix in named]
    _check_held_out([part.prefix for part in parts], held_out)
    valid = held_out if weights is None else _in_turn(weights, held_out)
    if expand_sets:
        train, valid = _expanded(train), _expanded(valid)
    # Megatron-LM asks for all three splits, and takes null for none.
    record = {"train": train, "valid": list(valid) or None, "test": None}
    with explained_failure(output, "--output"):
        publish_text(output, json.dumps(record, indent=2) + "\n")


def _expanded(paths: Sequence[str]) -> list[str]:
    shards, weights = expand_blend(parse_blend(paths))
    return shards if weights is None else _in_turn(weights, shards)


def _in_turn(weights: Sequence[float], prefixes: Sequence[str]) -> list[str]:
    pairs = zip(weights, prefixes, strict=True)
    return [entry for weight, prefix in pairs for entry in (f"{weight:.12g}", prefix)]


def _blended(named: str) -> SetInfo:
    """The shard or set that a user means; raises DataError for a job of several splits."""
    prefix = named_prefix(Path(named))
    path = job_manifest_path(prefix)
    if path.is_file() and len(splits := read_job_manifest(path).splits) > 1:
        names = ", ".join(f"{prefix}_{split}" for split in splits)
        raise DataError(f"{named} is a whole job; name a split of it: {names}")
    return set_info(prefix)


def _owners(prefixes: Sequence[str]) -> dict[str, str]:
    """Real path of each shard -> the prefix that names it; raises DataError for one named twice."""
    owners: dict[str, str] = {}
    for prefix in prefixes:
        for shard in expand(Path(prefix)):
            # The .idx, because a folder of links has links to files.
            path = os.path.realpath(f"{shard}.idx")
            if path in owners:
                raise DataError(f"{shard} is part of {owners[path]} and of {prefix}; name it once")
            owners[path] = prefix
    return owners


def _check_held_out(train: Sequence[str], valid: Sequence[str]) -> None:
    owners = _owners(train)
    for path, prefix in _owners(valid).items():
        if path in owners:
            raise DataError(
                f"--valid {prefix} and the training blend's {owners[path]} hold the same shard "
                f"({Path(path).stem}): a loss on text that was trained on tells nothing; hold out "
                "other text (`data preprocess --valid-fraction`)"
            )
