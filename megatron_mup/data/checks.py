"""Check the configured token shards before anything expensive starts."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from megatron_mup.config import RunConfig, SampleLayout
from megatron_mup.data.blend import (
    expand_blend,
    parse_blend,
    prefixes_without_weights,
    train_paths,
    valid_paths,
)
from megatron_mup.data.blend_plan import FREE_EPOCHS
from megatron_mup.data.datasets import packed_blend
from megatron_mup.data.manifest import ShardManifest
from megatron_mup.data.shard_sets import set_info, set_tokens
from megatron_mup.data.shards import ShardInfo, check_one_tokenizer, open_shard
from megatron_mup.errors import DataError

logger = logging.getLogger(__name__)

MOST_SHARDS = 32_766
"""Megatron's blends number their shards in 16 bits: megatron-core 0.19.2, blended_dataset.py."""


def check_training_data(run: RunConfig) -> None:
    """Check that every configured shard exists, is whole, and fits the model.

    Args:
        run: the run's configuration.

    Raises:
        DataError: no training data, a missing, truncated or empty shard, a set with holes, fewer
            tokens than one sequence, or token ids outside the vocabulary.
    """
    train = train_paths(run)
    if not train:
        raise DataError(
            "data.train_data_path is empty; make shards with 'megatron-mup data preprocess' and "
            "set data.train_data_path=[PREFIX]"
        )
    # Held-out shards that no evaluation will read need not exist.
    valid = valid_paths(run) if run.training.eval_iters > 0 else []
    if run.training.eval_iters > 0 and not valid:
        raise DataError(
            "data.valid_data_path is empty but training.eval_iters is "
            f"{run.training.eval_iters}; give held-out shards or set training.eval_iters=0"
        )
    documents = run.data.sample_layout is SampleLayout.DOCUMENT
    if documents:
        _check_special_tokens(run)
    infos: list[ShardInfo] = []
    for paths in (train, valid):
        if documents:
            # Without weights, which this refuses, the blend holds prefixes alone.
            shards, _ = expand_blend((prefixes_without_weights(paths), None))
        else:
            shards = _packed_shards(run, paths)
        infos += [_check_shard(run, shard, whole_sequence=not documents) for shard in shards]
    check_one_tokenizer(infos)


def _packed_shards(run: RunConfig, paths: list[str]) -> list[str]:
    """The shards of a blend for Megatron; what is left out is said."""
    shards, _ = packed_blend(run, paths)
    left_out = [shard for shard in expand_blend(parse_blend(paths))[0] if shard not in set(shards)]
    if left_out:
        logger.warning(
            f"left out, because they do not fill one sequence of {run.model.seq_length} tokens: "
            f"{', '.join(left_out)}"
        )
    if len(shards) > MOST_SHARDS:
        raise DataError(
            f"a blend of {len(shards)} shards; Megatron reads at most {MOST_SHARDS}: preprocess "
            "with a larger --shard-tokens"
        )
    return shards


def _check_shard(run: RunConfig, prefix: str, *, whole_sequence: bool) -> ShardInfo:
    shard = open_shard(Path(prefix), vocab_size=run.model.vocab_size)
    _check_end(run, prefix, shard.manifest)
    # A sample is a sequence and the token after it, the last label.
    if whole_sequence and shard.tokens <= run.model.seq_length:
        raise DataError(
            f"shard '{prefix}' has {shard.tokens} tokens, which is not one sequence of "
            f"model.seq_length {run.model.seq_length} + 1; use more text or a shorter sequence"
        )
    return shard


def _check_special_tokens(run: RunConfig) -> None:
    """The ids that ``document`` adds to a shard's must have rows in the embedding as well."""
    for name in ("eod_token", "bos_token"):
        token = getattr(run.data, name)
        if token is not None and token >= run.model.vocab_size:
            raise DataError(
                f"data.{name} is {token}, but sample_layout=document puts it into sequences and "
                f"model.vocab_size is {run.model.vocab_size} (ids 0 to vocab_size - 1); give the "
                "tokenizer's id or raise model.vocab_size"
            )


def _check_end(run: RunConfig, prefix: str, manifest: ShardManifest | None) -> None:
    """Refuse an end-of-document token that is not the shard's, where one is used."""
    used = run.data.sample_layout is SampleLayout.DOCUMENT or run.data.eod_mask_loss
    if used and manifest is not None and manifest.eod != run.data.eod_token:
        raise DataError(
            f"data.eod_token is {run.data.eod_token}, but the documents of shard '{prefix}' end "
            f"with {manifest.eod}; set data.eod_token={manifest.eod}"
        )


def check_epochs(run: RunConfig, train_samples: int) -> dict[str, float]:
    """How often a run reads each training shard or set.

    Args:
        run: the run's configuration; ``data.max_epochs`` is the limit.
        train_samples: sequences that the whole run asks for.

    Returns:
        Prefix as configured -> epochs; above 1, documents are repeated.

    Raises:
        DataError: more epochs than ``data.max_epochs``: the data runs out.
    """
    limit = run.data.max_epochs
    epochs = _epochs(run, train_samples)
    worst = max(epochs, key=lambda prefix: epochs[prefix])
    if limit is not None and epochs[worst] > limit:
        raise DataError(
            f"the training data runs out: {run.planned_iters} iterations read '{worst}' "
            f"{epochs[worst]:.3g} times, data.max_epochs is {limit:g}; shorten "
            "training.train_iters, add shards, or raise data.max_epochs"
        )
    return epochs


def repetition_warning(epochs: Mapping[str, float]) -> str | None:
    """What to say before a run reads data more than once; None if it does not.

    Args:
        epochs: by shard or set, from ``check_epochs``.
    """
    repeated = {prefix: count for prefix, count in epochs.items() if count > 1.0}
    if not repeated:
        return None
    listed = ", ".join(f"'{prefix}' {count:.3g} times" for prefix, count in repeated.items())
    worst = max(repeated.values())
    beyond = f"; more than {FREE_EPOCHS:g} times helps ever less (arXiv:2305.16264)"
    return (
        f"warning: training repeats its data: {listed}{beyond if worst > FREE_EPOCHS else ''}; add "
        "text, train fewer iterations, or refuse such runs with data.max_epochs=1"
    )


def _epochs(run: RunConfig, train_samples: int) -> dict[str, float]:
    """Prefix as configured -> how often it is read."""
    if run.data.sample_layout is SampleLayout.DOCUMENT:
        prefixes = prefixes_without_weights(train_paths(run))
        documents = sum(set_info(Path(prefix)).documents for prefix in prefixes)
        return dict.fromkeys(prefixes, train_samples / documents)
    prefixes, weights = parse_blend(train_paths(run))
    tokens = [set_tokens(Path(prefix)) for prefix in prefixes]
    # Without weights, Megatron blends shards by their length: all are read equally often.
    shares = tokens if weights is None else weights
    needed = train_samples * run.model.seq_length
    epochs = dict.fromkeys(prefixes, 0.0)
    for prefix, share, count in zip(prefixes, shares, tokens, strict=True):
        # A prefix may be named twice: a blend of Megatron's then reads it for both weights.
        epochs[prefix] += needed * share / sum(shares) / count
    return epochs
