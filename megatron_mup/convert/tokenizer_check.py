"""Whether a tokenizer is the one that a checkpoint's data was made with.

The same rules for every command that takes ``--tokenizer-model`` beside a checkpoint of this
package. Reads no weights.
"""

from __future__ import annotations

import logging

from megatron_mup.config import DataConfig, SampleLayout
from megatron_mup.convert.megatron_source import MegatronSource
from megatron_mup.data.tokenizer import Tokenizer
from megatron_mup.errors import DataError

logger = logging.getLogger(__name__)


def check_tokenizer(
    source: MegatronSource, tokenizer: Tokenizer, *, any_tokenizer: bool = False
) -> None:
    """Refuse a tokenizer that gives the model's ids another meaning.

    Args:
        source: the checkpoint.
        tokenizer: what the user passed.
        any_tokenizer: accept one that is not the recorded one, as long as its ids fit.

    Raises:
        DataError: another tokenizer, ids outside the model's vocabulary (padding rows were never
            trained), or another end of document.
    """
    size = source.model.vocab_size
    if tokenizer.vocab_size > size:
        raise DataError(
            f"--tokenizer-model has {tokenizer.vocab_size} ids, but the model of {source.where} "
            f"has vocab_size {size}; pass the tokenizer that the run's data was made with"
        )
    _check_recorded(source, tokenizer, any_tokenizer=any_tokenizer)
    _check_end(source.run.data, tokenizer, source.where)


def _check_recorded(source: MegatronSource, tokenizer: Tokenizer, *, any_tokenizer: bool) -> None:
    """Compare with the tokenizers that the manifests of the run's shards named."""
    data = source.provenance.get("data") or {}
    recorded = list(data.get("tokenizers") or [])
    if not recorded:
        logger.warning(
            "%s does not say which tokenizer made its data; --tokenizer-model (%d ids, the model "
            "has vocab_size %d) is taken as it is",
            source.where,
            tokenizer.vocab_size,
            source.model.vocab_size,
        )
    elif tokenizer.sha256 not in recorded and not any_tokenizer:
        raise DataError(
            f"--tokenizer-model has sha256 {tokenizer.sha256}, but the data of {source.where} was "
            f"made with {', '.join(recorded)}; pass that model file, or --any-tokenizer if this "
            "one gives the same ids"
        )


def _check_end(data: DataConfig, tokenizer: Tokenizer, where: str) -> None:
    """Compare the end of document with the run's, where training used and checked that option."""
    used = data.sample_layout is SampleLayout.DOCUMENT or data.eod_mask_loss
    if used and tokenizer.eod != data.eod_token:
        raise DataError(
            f"documents of --tokenizer-model end with id {tokenizer.eod} "
            f"({tokenizer.eod_token!r}), but {where} was trained with data.eod_token="
            f"{data.eod_token}; pass --eod-token with the piece of that id"
        )
