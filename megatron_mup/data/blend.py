"""Blends: which shards and sets training reads, and in what proportions.

A blend is Megatron's: prefixes alone, read in proportion to their length, or weights and prefixes
in turn. Where a prefix names a set, its weight is divided among its shards by their tokens, so
that each token of the set is read equally often. A blend file is that of Megatron-LM's
``--per-split-data-args-path``: a JSON object with the blends of "train", "valid" and "test". Must
not import torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_mup.config import RunConfig
from megatron_mup.data.shard_sets import expand
from megatron_mup.data.shards import token_count
from megatron_mup.errors import DataError

Blend = tuple[list[str], list[float] | None]
SPLITS = ("train", "valid", "test")

_LARGEST_BYTES = 1 << 24
_LOOKS = '{"train": ["0.7", "PREFIX", "0.3", "PREFIX"], "valid": ["PREFIX"], "test": null}'


def parse_blend(paths: Sequence[str]) -> Blend:
    """Megatron's blend: prefixes, or alternating weight and prefix.

    Raises:
        DataError: weights and prefixes do not alternate, or a weight is not positive.
    """
    if len(paths) < 2 or not _is_number(paths[0]):
        return list(paths), None
    weights, prefixes = paths[0::2], paths[1::2]
    if len(weights) != len(prefixes) or not all(_is_number(weight) for weight in weights):
        raise DataError(
            f"blend {list(paths)} does not alternate weight and prefix; write "
            "[0.7, first_prefix, 0.3, second_prefix] or prefixes alone"
        )
    numbers = [float(weight) for weight in weights]
    if not all(0 < number < float("inf") for number in numbers):
        raise DataError(f"blend weights {numbers} must be positive")
    return list(prefixes), numbers


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def train_paths(run: RunConfig) -> list[str]:
    """The training blend as it is configured, from options or the blend file.

    Raises:
        DataError: the blend file is missing or damaged.
    """
    if run.data.per_split_data_args_path is None:
        return list(run.data.train_data_path)
    return read_blend_file(Path(run.data.per_split_data_args_path))["train"]


def valid_paths(run: RunConfig) -> list[str]:
    """The held-out blend as it is configured, from options or the blend file.

    Raises:
        DataError: the blend file is missing or damaged.
    """
    if run.data.per_split_data_args_path is None:
        return list(run.data.valid_data_path)
    return read_blend_file(Path(run.data.per_split_data_args_path))["valid"]


def prefixes_without_weights(paths: Sequence[str]) -> list[str]:
    """The prefixes of ``sample_layout=document``, which reads each document equally often.

    Raises:
        DataError: the paths carry weights.
    """
    prefixes, weights = parse_blend(paths)
    if weights is not None:
        raise DataError(
            f"data.sample_layout=document reads every document equally often, but the blend "
            f"{list(paths)} has weights; give the prefixes alone, or use sample_layout=packed"
        )
    return prefixes


def expand_blend(blend: Blend, *, more_than_tokens: int = 0) -> Blend:
    """Put each set's shards in its place.

    Args:
        blend: prefixes of shards and sets.
        more_than_tokens: shards of a set that are not longer are left out, unless all are short:
            the last shard of a set is what was left over, and may not fill one sequence.

    Returns:
        A blend of shards; the weights of a set's shards add up to the set's.

    Raises:
        DataError: a set has holes, or a shard whose length decides is missing.
    """
    prefixes, weights = blend
    shards: list[str] = []
    divided: list[float] = []
    for prefix, weight in zip(prefixes, weights or [1.0] * len(prefixes), strict=True):
        members = expand(Path(prefix))
        if len(members) == 1:
            shards.append(str(members[0]))
            divided.append(weight)
            continue
        tokens = {str(shard): token_count(shard) for shard in members}
        long = {shard: count for shard, count in tokens.items() if count > more_than_tokens}
        kept = long or tokens
        shards += kept
        divided += [weight * count / max(sum(kept.values()), 1) for count in kept.values()]
    return shards, None if weights is None else divided


def read_blend_file(path: Path) -> dict[str, list[str]]:
    """Read a blend file.

    Args:
        path: JSON as Megatron-LM's ``--per-split-data-args-path`` takes it: for each split a list
            of weights and prefixes, one text of them, or null.

    Returns:
        Paths of "train", "valid" and "test"; empty lists where the file has none. Prefixes are
        relative to the working directory, as in Megatron-LM.

    Raises:
        DataError: the file is missing, no JSON of that form, or names no training data.
    """
    try:
        if path.stat().st_size > _LARGEST_BYTES:
            raise ValueError(f"larger than {_LARGEST_BYTES >> 20} MiB")
        record = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(
            f"cannot read the blend file {path}: {error.strerror or error}; correct "
            "data.per_split_data_args_path, or make it with `megatron-mup data blend`"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: broken JSON ({error}); it must look like {_LOOKS}") from error
    if not isinstance(record, dict) or not record.keys() <= set(SPLITS):
        found = list(record) if isinstance(record, dict) else type(record).__name__
        raise DataError(f"{path}: holds {found}; it must look like {_LOOKS}")
    blends = {split: _entries(record.get(split), path, split) for split in SPLITS}
    if not blends["train"]:
        raise DataError(f"{path}: names no training data; it must look like {_LOOKS}")
    return blends


def _entries(value: Any, path: Path, split: str) -> list[str]:
    """The weights and prefixes of one split as texts."""
    if value is None:
        return []
    if isinstance(value, str):
        return value.split()
    # Megatron takes weights as numbers as well; true would be one to Python.
    if isinstance(value, list) and all(type(entry) in (str, int, float) for entry in value):
        return [str(entry) for entry in value]
    raise DataError(
        f"{path}: {split!r} is {json.dumps(value)[:80]}, not a list of weights and prefixes; it "
        f"must look like {_LOOKS}"
    )
