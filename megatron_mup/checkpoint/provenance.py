"""Where a checkpoint comes from: commit, package versions, world size, digests of its data.

Reads manifests, never the tokens. Must not import megatron's training parts.
"""

from __future__ import annotations

import hashlib
from importlib import metadata
from pathlib import Path
from typing import Any

from megatron_mup.config import RunConfig
from megatron_mup.data.blend import expand_blend, parse_blend, train_paths
from megatron_mup.data.shards import open_shard
from megatron_mup.revision import revision

_PACKAGES = ("torch", "megatron-core", "transformer-engine", "numpy", "emerging-optimizers")


def provenance(run: RunConfig, *, world_size: int) -> dict[str, Any]:
    """What is saved beside the configuration, as plain data.

    Args:
        run: the run's configuration.
        world_size: number of processes that save.

    Raises:
        DataError: a configured training shard is missing or damaged.
    """
    return {
        "revision": revision(),
        "packages": _package_versions(),
        "world_size": world_size,
        "data": data_identity(run),
    }


def _package_versions() -> dict[str, str]:
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def data_identity(run: RunConfig) -> dict[str, Any] | None:
    """Digests of the training shards and their tokenizers; None without configured shards.

    A shard made elsewhere has no manifest: the digest of its .idx stands for it.

    Raises:
        DataError: a shard is missing or damaged.
    """
    prefixes, weights = expand_blend(parse_blend(train_paths(run)))
    if not prefixes:
        return None
    shards, tokenizers = [], set()
    for prefix in prefixes:
        manifest = open_shard(Path(prefix)).manifest
        if manifest is None:
            with Path(f"{prefix}.idx").open("rb") as stream:
                shards.append(f"idx:{hashlib.file_digest(stream, 'sha256').hexdigest()}")
            continue
        shards.append(manifest.bin_sha256)
        tokenizers.add(manifest.tokenizer_sha256)
    return {"train_shards": shards, "weights": weights, "tokenizers": sorted(tokenizers)}
