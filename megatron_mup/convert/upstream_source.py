"""Weights from a checkpoint that Megatron-LM's ``megatron.training`` saved.

Such a folder has no record of ours: its model stands in the saved command line
(``upstream_model``). Owns the keys and the row order under which upstream (megatron-core 0.19.2,
torch_dist) stores a GPT. Nothing of a file is run.
"""

from __future__ import annotations

import logging
import re
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from megatron_mup.checkpoint.folders import METADATA, RECORD, TRACKER, tracked_iteration
from megatron_mup.checkpoint.integrity import checkpoint_folder, iteration_of
from megatron_mup.checkpoint.safe_pickle import safe_reading
from megatron_mup.convert.stored_places import Place, place_of, read_rows
from megatron_mup.convert.stored_tensors import StoredTensors
from megatron_mup.convert.upstream_model import upstream_model, upstream_multipliers
from megatron_mup.errors import CheckpointError, MupError
from megatron_mup.parameterization.evaluation import Multipliers
from megatron_mup.parameterization.roles import LogicalTensor, logical_tensors

logger = logging.getLogger(__name__)

_EMBEDDING = "embedding.word_embeddings.weight"
# Several optimizers of one run are numbered.
_OPTIMIZER = re.compile(r"^(?:chained_\d+\.)?optimizer\.(?:state\.(?:fp32_)?param\.(.+))?")
_LAYERS = "decoder.layers."
_RELEASE = "release"


class UpstreamSource:
    """A ``WeightSource`` over a checkpoint of ``megatron.training``, format torch_dist.

    Args:
        folder: the folder given to upstream's ``--save``, or one ``iter_*`` folder of it.
        iteration: which checkpoint of the folder; unset means the one that its tracker names.

    Attributes:
        folder: the checkpoint.
        args: upstream's command line as it was saved.

    Raises:
        CheckpointError: it is missing, damaged, of another format, wants to run code, or holds a
            model that this package's GPT cannot compute.
    """

    def __init__(self, folder: Path, *, iteration: int | None = None) -> None:
        self.folder = _chosen(folder, iteration)
        self.where = str(self.folder)
        _check_format(self.folder)
        common = _common_state(self.folder)
        self.args = _arguments(common, self.where)
        self._stored = StoredTensors(self.folder)
        self._main = _main_weights(self._stored, self.where)
        self.model = upstream_model(self.args, vocabulary=self._vocabulary(), where=self.where)
        self.multipliers: Multipliers = upstream_multipliers(self.args, self.model)
        self._places = {
            tensor.name: (tensor, self._place(tensor))
            for tensor in logical_tensors(self.model.shape)
        }
        self._check_tensors()
        self.provenance: Mapping[str, Any] = self._provenance(common)

    def read(self, name: str) -> Tensor:
        """One logical tensor; see ``WeightSource.read``."""
        if name not in self._places:
            raise CheckpointError(f"{self.where} has no tensor {name}")
        tensor, place = self._places[name]
        key = self._main.get(place.key, place.key)
        return read_rows(self._stored, key, place, tensor.shape)

    def _vocabulary(self) -> int:
        stored = self._stored.tensors.get(_EMBEDDING)
        if stored is None:
            raise CheckpointError(
                f"{self.where} has no tensor {_EMBEDDING}, so it is no GPT of megatron.training; "
                "give another folder"
            )
        return stored.shape[0]

    def _place(self, tensor: LogicalTensor) -> Place:
        """Where a tensor lies; layers that upstream takes for unlike have a key each."""
        place = place_of(tensor, self.model.shape)
        own = place.key.replace(_LAYERS, f"{_LAYERS}{place.layer}.")
        if place.layer is None or own not in self._stored.tensors:
            return place
        rows = tuple(replace(part, offset=part.offset[1:]) for part in place.rows)
        return Place(own, place.shape[1:], None, rows)

    def _check_tensors(self) -> None:
        """Check every tensor's name and shape."""
        expected = {place.key: place.shape for _, place in self._places.values()}
        problems = [
            f"{key} {'is missing' if stored is None else f'has shape {stored.shape}'}, not {shape}"
            for key, shape in expected.items()
            if (stored := self._stored.tensors.get(key)) is None or stored.shape != shape
        ]
        for key, stored in self._stored.tensors.items():
            if key in expected or _OPTIMIZER.match(key) or "_extra_state" in key:
                continue
            problems.append(f"{key} {stored.shape} has no place in the model")
        if problems:
            more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise CheckpointError(
                f"{self.where} does not hold the model that its arguments describe: "
                f"{'; '.join(problems[:3])}{more}; only models that megatron.training builds from "
                "its own arguments can be taken over"
            )

    def _provenance(self, common: Mapping[str, Any]) -> dict[str, Any]:
        stored = self._stored.tensors[self._main.get(_EMBEDDING, _EMBEDDING)]
        return {
            "trained_by": "megatron.training",
            "iteration": common.get("iteration", iteration_of(self.folder) or 0),
            "consumed_train_samples": getattr(self.args, "consumed_train_samples", None),
            "weights_dtype": str(stored.dtype).removeprefix("torch."),
        }


def _chosen(folder: Path, iteration: int | None) -> Path:
    """The folder of one checkpoint."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder; give the one of a checkpoint")
    if iteration is not None:
        chosen = checkpoint_folder(folder, iteration)
    elif (folder / METADATA).exists() or iteration_of(folder) is not None:
        return folder
    else:
        tracked = tracked_iteration(folder)
        if tracked is None or not (tracked == _RELEASE or tracked.isdecimal()):
            raise CheckpointError(
                f"{folder} has no {TRACKER} that names a checkpoint (it says {tracked!r}); give "
                "one of its iter_* folders"
            )
        chosen = folder / _RELEASE
        if tracked != _RELEASE:
            chosen = checkpoint_folder(folder, int(tracked))
    if not chosen.is_dir():
        raise CheckpointError(f"{chosen} is missing; give another iteration or folder")
    return chosen


def _check_format(folder: Path) -> None:
    if (folder / RECORD).exists():
        raise CheckpointError(
            f"{folder} was saved by this package ({RECORD} is in it); read it as its own "
            "checkpoint, with the multipliers of that record"
        )
    if (folder / METADATA).exists():
        return
    if any(folder.glob("mp_rank_*")):
        raise CheckpointError(
            f"{folder} has Megatron's legacy format (mp_rank_*), one file for each rank; load and "
            "save it with megatron.training under --auto-detect-ckpt-format --ckpt-format "
            "torch_dist (or --ckpt-convert-format torch_dist), then give the new folder"
        )
    raise CheckpointError(
        f"{folder} has no {METADATA}, so it is incomplete or not of Megatron's format torch_dist; "
        "give another one, or save it again with --ckpt-format torch_dist"
    )


def _common_state(folder: Path) -> dict[str, Any]:
    """Everything of a checkpoint that is not sharded: plain data."""
    # Not at the top: megatron may only be imported once the packages above have prepared torch.
    from megatron.core import dist_checkpointing

    try:
        with safe_reading(folder):
            common = dist_checkpointing.load_common_state_dict(folder)
    except MupError:
        raise
    except (Exception, CheckpointException) as error:
        # torch's CheckpointException derives from BaseException.
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(
            f"cannot read {folder} ({lines[-1].strip()}); copy it again or use another checkpoint"
        ) from error
    return dict(common)


def _arguments(common: Mapping[str, Any], where: str) -> Namespace:
    args = common.get("args")
    if not isinstance(args, Namespace):
        raise CheckpointError(
            f"{where} holds no arguments of megatron.training, so its model is unknown; give a "
            "checkpoint that megatron.training saved"
        )
    version = common.get("checkpoint_version")
    if version != 3.0:
        raise CheckpointError(
            f"{where} has checkpoint_version {version}, whose rows of query, key and value are in "
            "another order than version 3.0's; load and save it with megatron.training"
        )
    return args


def _main_weights(stored: StoredTensors, where: str) -> dict[str, str]:
    """Keys of the fp32 main weights, by the key of the weight."""
    found = {}
    for key, tensor in stored.tensors.items():
        match = _OPTIMIZER.match(key)
        weight = stored.tensors.get(match[1] or "") if match else None
        if match and weight is not None and weight.shape == tensor.shape:
            found[match[1]] = key
    dtype = stored.tensors[_EMBEDDING].dtype if _EMBEDDING in stored.tensors else torch.float32
    if dtype != torch.float32 and not found and any(map(_OPTIMIZER.match, stored.tensors)):
        logger.warning(
            "%s keeps its fp32 main weights in the distributed optimizer's own buffers, so the %s "
            "weights are read; to keep the main weights, save it once more with megatron.training "
            "under --dist-ckpt-optim-fully-reshardable",
            where,
            str(dtype).removeprefix("torch."),
        )
    return found
