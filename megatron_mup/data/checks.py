"""Check the configured token shards before anything expensive starts."""

from __future__ import annotations

from pathlib import Path

from megatron_mup.config import RunConfig, SampleLayout
from megatron_mup.data.datasets import parse_blend, prefixes_without_weights
from megatron_mup.data.shards import ShardManifest, open_shard
from megatron_mup.errors import DataError


def check_training_data(run: RunConfig) -> None:
    """Check that every configured shard exists, is whole, and fits the model.

    Args:
        run: the run's configuration.

    Raises:
        DataError: no training data, a missing, truncated or empty shard, fewer tokens than one
            sequence, or token ids outside the vocabulary.
    """
    if not run.data.train_data_path:
        raise DataError(
            "data.train_data_path is empty; make shards with 'megatron-mup data preprocess' and "
            "set data.train_data_path=[PREFIX]"
        )
    if run.training.eval_iters > 0 and not run.data.valid_data_path:
        raise DataError(
            "data.valid_data_path is empty but training.eval_iters is "
            f"{run.training.eval_iters}; give held-out shards or set training.eval_iters=0"
        )
    # Held-out shards that no evaluation will read need not exist.
    valid = run.data.valid_data_path if run.training.eval_iters > 0 else []
    documents = run.data.sample_layout is SampleLayout.DOCUMENT
    if documents:
        _check_special_tokens(run)
    for paths in (run.data.train_data_path, valid):
        prefixes = prefixes_without_weights(paths) if documents else parse_blend(paths)[0]
        for prefix in prefixes:
            shard = open_shard(Path(prefix), vocab_size=run.model.vocab_size)
            _check_end(run, prefix, shard.manifest)
            if documents:
                continue
            # A sample is a sequence and the token after it, the last label.
            if shard.tokens <= run.model.seq_length:
                raise DataError(
                    f"shard '{prefix}' has {shard.tokens} tokens, which is not one sequence of "
                    f"model.seq_length {run.model.seq_length} + 1; use more text or a shorter "
                    "sequence"
                )


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
    """How often a run reads each training shard.

    Args:
        run: the run's configuration; ``data.max_epochs`` is the limit.
        train_samples: sequences that the whole run asks for.

    Returns:
        Prefix -> epochs; above 1, documents are repeated.

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


def _epochs(run: RunConfig, train_samples: int) -> dict[str, float]:
    """Prefix -> how often it is read."""
    if run.data.sample_layout is SampleLayout.DOCUMENT:
        prefixes = prefixes_without_weights(run.data.train_data_path)
        documents = sum(open_shard(Path(prefix)).documents for prefix in prefixes)
        return dict.fromkeys(prefixes, train_samples / documents)
    prefixes, weights = parse_blend(run.data.train_data_path)
    tokens = [open_shard(Path(prefix)).tokens for prefix in prefixes]
    # Without weights, Megatron blends shards by their length: all are read equally often.
    shares = tokens if weights is None else weights
    needed = train_samples * run.model.seq_length
    return {
        prefix: needed * share / sum(shares) / count
        for prefix, share, count in zip(prefixes, shares, tokens, strict=True)
    }
