"""Token shards as Megatron-Core datasets: the loader is upstream's, never our own.

``GPTDataset`` concatenates documents, shuffles by seed and cuts windows of ``seq_length + 1``
tokens. Its sample order depends on the seed and the shards, not on the layout of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from megatron_mup import platform
from megatron_mup.config import RunConfig
from megatron_mup.errors import DataError

Blend = tuple[list[str], list[float] | None]


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
    """The three facts that ``GPTDataset`` asks of a tokenizer (0.19.2)."""

    vocab_size: int
    eod: int

    @property
    def unique_identifiers(self) -> dict[str, int]:
        """Part of the key of Megatron's index cache."""
        return {"vocab_size": self.vocab_size, "eod": self.eod}


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
    if min(numbers) <= 0:
        raise DataError(f"blend weights {numbers} must be positive")
    return list(prefixes), numbers


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


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
    """
    platform.prepare()
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    train = parse_blend(run.data.train_data_path)
    valid = parse_blend(run.data.valid_data_path) if valid_samples else None
    cache = run.data.data_cache_path or str(Path(train[0][0]).parent / "cache")
    config = GPTDatasetConfig(
        random_seed=run.training.seed,
        sequence_length=run.model.seq_length,
        blend_per_split=[train, valid, None],
        path_to_cache=cache,
        tokenizer=_ShardTokenizer(run.model.vocab_size, run.data.eod_token),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=run.data.eod_mask_loss,
        create_attention_mask=False,
    )
    sizes = [train_samples, valid_samples, 0]
    builder = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config)
    train_set, valid_set, _ = builder.build()
    return train_set, valid_set
