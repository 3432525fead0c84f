"""Write a model as a folder that transformers loads: safetensors shards, config.json, model card.

Streams: one logical tensor is in memory at a time. Multipliers that the
format has not are folded into the weights in fp32 before the one cast.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_mup.checkpoint.integrity import digest_files, write_checksums
from megatron_mup.convert.formats import (
    REMOTE_CODE,
    HfFormat,
    hf_tensors,
    refuse,
    stored_model,
    stored_multipliers,
)
from megatron_mup.convert.huggingface_config import config_dict
from megatron_mup.convert.huggingface_folder import CONFIG_FILE
from megatron_mup.convert.model_card import is_our_card, model_card
from megatron_mup.convert.published_folder import Target, check_room, published_folder
from megatron_mup.convert.rescaling import RescaledWeights, factors
from megatron_mup.convert.safetensors_shards import (
    INDEX_FILE,
    Entry,
    index,
    plan_shards,
    write_file,
)
from megatron_mup.convert.weight_checksums import write_tensor_checksums
from megatron_mup.convert.weights import WeightSource
from megatron_mup.errors import CheckpointError

EXPORT_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""Dtypes of the weights, by the names that config.json uses."""

MAX_SHARD_BYTES = 5 * 10**9
"""What transformers' save_pretrained had for years: hosts and browsers cope with it."""

GENERATION_FILE = "generation_config.json"
CARD_FILE = "README.md"
_TOKENIZER_FILE = "tokenizer_config.json"
_REMOTE_PACKAGE = "megatron_mup.convert.remote_code"


@dataclass(frozen=True, kw_only=True)
class HfExport:
    """What was written.

    Attributes:
        folder: where it lies; ``is_rejected`` tells whether it was approved.
        hf_format: the format.
        dtype: of the weights: ``float32``, ``bfloat16`` or ``float16``.
        files: names of the weight files.
        tensors: how many there are.
        elements: of all tensors together.
        weight_bytes: data bytes of all tensors.
        folded: whether weights differ from the source's, because of the format's multipliers.
    """

    folder: Path
    hf_format: HfFormat
    dtype: str
    files: tuple[str, ...]
    tensors: int
    elements: int
    weight_bytes: int
    folded: bool


def as_stored(source: WeightSource, hf_format: HfFormat) -> WeightSource:
    """The source under the gains and multipliers that a format stores, before the cast.

    Raises:
        CheckpointError: the format cannot hold the model; names those that can.
    """
    refuse(hf_format, source.model)
    model = stored_model(hf_format, source.model)
    multipliers = stored_multipliers(hf_format, source.model, source.multipliers)
    return RescaledWeights(source, model, multipliers)


def write_huggingface(
    source: WeightSource,
    folder: Path,
    *,
    hf_format: HfFormat,
    dtype: str = "float32",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    allow_non_finite: bool = False,
    token_ids: Mapping[str, int | None] | None = None,
    progress: Callable[[int, int], None] | None = None,
    extra_files: Callable[[Path], None] | None = None,
    approve: Callable[[Path], bool] | None = None,
) -> HfExport:
    """Write a source's model to a folder, which appears when all is in it; says what was written.

    Args:
        source: the weights, under their own multipliers; folded here where the format has none.
        folder: the folder to make.
        hf_format: the model class.
        dtype: of the weights in the files, a key of ``EXPORT_DTYPES``.
        max_shard_bytes: data bytes of one file.
        overwrite: replace an earlier export, which its card tells.
        allow_non_finite: write weights that are not finite (of a diverged run).
        token_ids: ``bos_token_id``, ``eos_token_id``, ``pad_token_id`` of the tokenizer.
        progress: called with the bytes written so far and in all.
        extra_files: called with the unfinished folder, to add files (the tokenizer's).
        approve: called with the complete folder; see ``published_folder``.

    Raises:
        CheckpointError: the format cannot hold the model or a weight, or the folder cannot be made.
    """
    exporter = _Exporter(source, folder.absolute(), hf_format, dtype, max_shard_bytes)
    exporter.allow_non_finite, exporter.progress = allow_non_finite, progress
    with published_folder(exporter.target(overwrite=overwrite), approve=approve) as output:
        exporter.fill(output.hidden, dict(token_ids or {}))
        if extra_files is not None:
            extra_files(output.hidden)
        exporter.write_card(output.hidden, dict(token_ids or {}))
    return replace(exporter.export, folder=output.folder)


class _Exporter:
    """One export: what it will be, and the writing of its files into a folder."""

    allow_non_finite = False
    progress: Callable[[int, int], None] | None = None

    def __init__(
        self,
        source: WeightSource,
        folder: Path,
        hf_format: HfFormat,
        dtype: str,
        max_shard_bytes: int,
    ) -> None:
        self._source, self._stored = source, as_stored(source, hf_format)
        if dtype not in EXPORT_DTYPES:
            raise CheckpointError(
                f"cannot write weights as {dtype}; choose one of {', '.join(EXPORT_DTYPES)}"
            )
        if max_shard_bytes < 1:
            raise CheckpointError(f"max_shard_bytes is {max_shard_bytes}; it must be positive")
        self._dtype, self._done_bytes = EXPORT_DTYPES[dtype], 0
        tensors = hf_tensors(hf_format, source.model)
        self._logical = {tensor.name: tensor.logical for tensor in tensors}
        entries = [Entry(tensor.name, tensor.shape) for tensor in tensors]
        self._shards = plan_shards(
            entries, itemsize=self._dtype.itemsize, max_shard_bytes=max_shard_bytes
        )
        elements = sum(entry.elements for entry in entries)
        self.export = HfExport(
            folder=folder,
            hf_format=hf_format,
            dtype=dtype,
            files=tuple(self._shards),
            tensors=len(entries),
            elements=elements,
            weight_bytes=elements * self._dtype.itemsize,
            folded=_changes_weights(source, self._stored),
        )

    def target(self, *, overwrite: bool) -> Target:
        """Where it goes; what it may replace has a card of ours."""
        return Target(
            folder=self.export.folder,
            ours=lambda held: is_our_card(held / CARD_FILE),
            overwrite=overwrite,
            source=Path(self._source.where),
        )

    def fill(self, folder: Path, token_ids: dict[str, int | None]) -> None:
        """Write everything but the card."""
        less = "export in bfloat16, " if self._dtype is torch.float32 else ""
        advice = f"make room, {less}or choose another disk"
        check_room(folder, self.export.weight_bytes, folder=self.export.folder, advice=advice)
        self._write_weights(folder)
        stored, export = self._stored, self.export
        config = config_dict(
            export.hf_format, stored.model, stored.multipliers, export.dtype, token_ids
        )
        _write_json(folder / CONFIG_FILE, config)
        known = {name: value for name, value in token_ids.items() if value is not None}
        _write_json(folder / GENERATION_FILE, known)
        if export.hf_format is HfFormat.MEGATRON_MUP:
            for name in REMOTE_CODE:
                code = resources.files(_REMOTE_PACKAGE).joinpath(name).read_text(encoding="utf-8")
                (folder / name).write_text(code, encoding="utf-8")

    def _write_weights(self, folder: Path) -> None:
        """Write the weights, their index and their checksums; a file is digested beside the next.

        The checksums are those of weights alone: whoever publishes a model may edit the rest.
        """
        pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="digest")
        try:
            running = []
            sums: dict[str, int] = {}
            for name, shard in self._shards.items():
                sums |= write_file(folder / name, shard, self._dtype, self._read)
                running.append(pool.submit(digest_files, folder, [name]))
            digests = {}
            if len(self._shards) > 1:
                _write_json(folder / INDEX_FILE, index(self._shards, itemsize=self._dtype.itemsize))
                digests = digest_files(folder, [INDEX_FILE])
            for task in running:
                digests |= task.result()
        finally:
            pool.shutdown(cancel_futures=True)
        write_tensor_checksums(folder, sums)
        write_checksums(folder, digests)

    def write_card(self, folder: Path, token_ids: dict[str, int | None]) -> None:
        """Write README.md, which says whether a tokenizer is there."""
        card = model_card(
            self._source,
            name=self.export.folder.name,
            hf_format=self.export.hf_format,
            dtype=self.export.dtype,
            elements=self.export.elements,
            folded=self.export.folded,
            tokenizer=(folder / _TOKENIZER_FILE).exists(),
            token_ids=token_ids,
        )
        (folder / CARD_FILE).write_text(card, encoding="utf-8")

    def _read(self, name: str) -> Tensor:
        """One tensor by its name in the format, fit for the export's dtype."""
        values = self._stored.read(self._logical[name])
        if not self.allow_non_finite:
            self._check(values, name)
        # The tensor that was handed out before is on the disk by now, or in its cache.
        self._done_bytes += values.numel() * self._dtype.itemsize
        if self.progress is not None:
            self.progress(self._done_bytes, self.export.weight_bytes)
        return values

    def _check(self, values: Tensor, name: str) -> None:
        """Refuse what is not finite before or after the cast; NaN is its own extreme."""
        extremes = torch.stack(torch.aminmax(values))
        where = f"{self._logical[name]} ({name}) of {self._source.where}"
        if not extremes.isfinite().all():
            raise CheckpointError(
                f"the weights {where} are not finite: the run has diverged or the source is "
                "damaged; export an earlier iteration, or pass --allow-non-finite"
            )
        if not extremes.to(self._dtype).isfinite().all():
            largest = extremes.abs().max().item()
            raise CheckpointError(
                f"the weights {where} reach {largest:g}, which {self.export.dtype} cannot hold "
                f"(at most {torch.finfo(self._dtype).max:g}); export in bfloat16 or float32"
            )


def _changes_weights(source: WeightSource, stored: WeightSource) -> bool:
    """Whether the format's multipliers are other ones; their last bits say nothing."""
    changes = factors(source.model, source.multipliers, stored.multipliers)
    return any(factor != 1.0 for factor in changes.values())


def _write_json(path: Path, contents: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(contents, indent=2, sort_keys=True) + "\n", encoding="utf-8")
