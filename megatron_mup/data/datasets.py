"""Token shards as Megatron-Core datasets: the loader is upstream's, never our own.

``GPTDataset`` concatenates documents, shuffles by seed and cuts windows of ``seq_length + 1``
tokens. Its sample order depends on the seed and the shards, not on the layout of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from megatron_mup import platform
from megatron_mup.config import RunConfig, SampleLayout
from megatron_mup.data.blend import (
    Blend,
    expand_blend,
    parse_blend,
    prefixes_without_weights,
    train_paths,
    valid_paths,
)
from megatron_mup.data.cache_safety import guarded_cache
from megatron_mup.data.padded_documents import PaddedDocuments
from megatron_mup.data.shards import file_sha256, open_shard


class Samples(Protocol):
    """What training reads from: an indexed collection of samples.

    A sample maps ``tokens``, ``labels`` (int64 [S]), ``loss_mask`` (float [S]) and
    ``position_ids`` (int64 [S]).
    """

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def __getitem__(self, index: int) -> Mapping[str, Tensor]:
        """The sample with this number."""
        ...


@dataclass(frozen=True)
class _ShardTokenizer:
    """What ``GPTDataset`` asks of a tokenizer (0.19.2), and what the shards hold."""

    vocab_size: int
    eod: int
    contents: tuple[str, ...]

    @property
    def unique_identifiers(self) -> dict[str, int | tuple[str, ...]]:
        """Part of the key of Megatron's index cache, and of nothing else.

        Upstream's key names a shard by its path: a shard made anew at the same place would be read
        through the index of its predecessor. The tokenizer is the only part of the key that a
        caller may fill, so the shards' digests stand here. The order of samples comes from the
        seed and the shards alone and does not see this key.
        """
        return {"vocab_size": self.vocab_size, "eod": self.eod, "contents": self.contents}


def _content_key(prefix: str) -> str:
    """Digest of what decides a shard's samples.

    Raises:
        DataError: the shard is missing or damaged.
    """
    manifest = open_shard(Path(prefix)).manifest
    # The .idx is hashed at every start, because document lengths alone decide an index; the .bin's
    # hash shows in the cache's description which tokens it was made for.
    layout = file_sha256(Path(f"{prefix}.idx"))
    return f"idx:{layout} bin:{manifest.bin_sha256 if manifest else 'no manifest'}"


def _shard_tokenizer(run: RunConfig, *blends: Blend) -> _ShardTokenizer:
    """What upstream asks of a tokenizer, for the shards of these blends."""
    prefixes = [prefix for blend in blends for prefix in blend[0]]
    contents = tuple(_content_key(prefix) for prefix in prefixes)
    return _ShardTokenizer(run.model.vocab_size, run.data.eod_token, contents)


def build_datasets(
    run: RunConfig, *, train_samples: int, valid_samples: int
) -> tuple[Samples, Samples | None]:
    """Build the training and held-out datasets; every rank must call it.

    Args:
        run: the run's configuration.
        train_samples: sequences that training will ask for.
        valid_samples: sequences that one evaluation will ask for; 0 builds no held-out set.

    Returns:
        Training samples, held-out samples.

    Raises:
        DataError: a shard is missing or damaged, or the index cache holds what no index is.
    """
    if run.data.sample_layout is SampleLayout.DOCUMENT:
        train_set = _documents(run, train_paths(run), train_samples)
        if not valid_samples:
            return train_set, None
        return train_set, _documents(run, valid_paths(run), valid_samples)
    return _packed_datasets(run, train_samples=train_samples, valid_samples=valid_samples)


def _documents(run: RunConfig, paths: Sequence[str], samples: int) -> PaddedDocuments:
    data = run.data
    return PaddedDocuments(
        expand_blend((prefixes_without_weights(paths), None))[0],
        seq_length=run.model.seq_length,
        eod=data.eod_token,
        bos=data.eod_token if data.bos_token is None else data.bos_token,
        seed=run.training.seed,
        samples=samples,
    )


def packed_blend(run: RunConfig, paths: Sequence[str]) -> Blend:
    """The shards that Megatron blends, in order.

    Args:
        run: the run's configuration.
        paths: a configured blend, which may name sets.

    Raises:
        DataError: the blend cannot be read, or a set has holes.
    """
    return expand_blend(parse_blend(paths), more_than_tokens=run.model.seq_length)


def _packed_datasets(
    run: RunConfig, *, train_samples: int, valid_samples: int
) -> tuple[Samples, Samples | None]:
    """Megatron's windows over concatenated documents."""
    platform.prepare()
    from megatron.core.datasets import blended_megatron_dataset_builder as blending
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    train = packed_blend(run, train_paths(run))
    valid = packed_blend(run, valid_paths(run)) if valid_samples else None
    cache = Path(run.data.data_cache_path or Path(train[0][0]).parent / "cache")
    config = GPTDatasetConfig(
        random_seed=run.training.seed,
        sequence_length=run.model.seq_length,
        # Held-out text is a shard of its own, so that no split changes with the number of samples.
        blend_per_split=[train, valid, None],
        path_to_cache=str(cache),
        tokenizer=_shard_tokenizer(run, *(blend for blend in (train, valid) if blend)),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=run.data.eod_mask_loss,
        create_attention_mask=False,
    )
    sizes = [train_samples, valid_samples, 0]
    builder = blending.BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config)
    with guarded_cache(cache, builds=_builds_cache()):
        train_set, valid_set, _ = builder.build()
    return train_set, valid_set


def _builds_cache() -> bool:
    """Upstream builds indexes on rank 0 while the others wait; then all of them read."""
    return not dist.is_initialized() or dist.get_rank() == 0
