"""Read a Hugging Face folder as logical tensors: Llama, Granite, or this package's own remote code.

Everything that the headers of the files can show is checked before a weight is read. Needs neither
transformers nor the code in the folder, and runs none of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_mup.convert.formats import HfTensor, hf_tensors
from megatron_mup.convert.huggingface_config import read_config
from megatron_mup.convert.huggingface_folder import (
    CONFIG_FILE,
    CURE,
    HuggingFaceFolder,
    read_json,
    several,
)
from megatron_mup.convert.safetensors_shards import DTYPES
from megatron_mup.convert.weights import all_finite
from megatron_mup.errors import CheckpointError

_TIED_READOUT = "lm_head.weight"
_EMBEDDING = "model.embed_tokens.weight"
COMPUTED = ".rotary_emb.inv_freq"
"""Ending of tensors that old versions of transformers saved and new ones compute."""


class HuggingFaceSource:
    """Weights of a Hugging Face folder; a ``WeightSource``.

    Args:
        folder: holds config.json and safetensors files, with an index if they are several.

    Attributes:
        hf_format: which model class it is of.
        dtypes: dtypes of the tensors in the files, as the files name them.

    Raises:
        CheckpointError: a file is missing or damaged; the model is of a kind that this package
            cannot hold exactly; a tensor is missing, of another shape or dtype, or unknown.
    """

    def __init__(self, folder: Path) -> None:
        self.where = str(folder)
        path = folder / CONFIG_FILE
        self.hf_format, self.model, self.multipliers = read_config(read_json(path), str(path))
        self.provenance: Mapping[str, Any] = {
            "huggingface": {"folder": str(folder), "model_type": self.hf_format.value}
        }
        self._files = HuggingFaceFolder(folder).files
        expected = {tensor.name: tensor for tensor in hf_tensors(self.hf_format, self.model)}
        self._check_names(expected)
        for tensor in expected.values():
            self._check_tensor(tensor)
        self._names = {tensor.logical: tensor.name for tensor in expected.values()}
        self.dtypes = sorted({self._files[name].tensors[name].dtype for name in expected})

    def read(self, name: str) -> Tensor:
        """One logical tensor; see ``WeightSource.read``."""
        if name not in self._names:
            raise CheckpointError(f"{self.where} has no tensor {name}")
        hf_name = self._names[name]
        file = self._files[hf_name]
        values = file.read(hf_name)
        if not all_finite(values):
            raise CheckpointError(
                f"{file.path}: tensor {hf_name} is not finite; the file is damaged, or its "
                "training had diverged"
            )
        return values

    def _check_names(self, expected: Mapping[str, HfTensor]) -> None:
        missing = [name for name in expected if name not in self._files]
        if missing:
            raise CheckpointError(
                f"{self.where} lacks {several(missing)}, which its config.json asks for; {CURE}"
            )
        surplus = [
            name for name in self._files if name not in expected and not name.endswith(COMPUTED)
        ]
        # A tied readout may have been written all the same.
        if surplus == [_TIED_READOUT] and not self.model.untie_embeddings_and_output_weights:
            self._check_tied()
        elif surplus:
            raise CheckpointError(
                f"{self.where} holds {several(surplus)} ({self._files[surplus[0]].path.name}), "
                f"which a {self.hf_format} of this config.json has not; it would be lost"
            )

    def _check_tied(self) -> None:
        readout, embedding = (self._files[name].read(name) for name in (_TIED_READOUT, _EMBEDDING))
        if not torch.equal(readout, embedding):
            raise CheckpointError(
                f"{self.where}: config.json ties the readout to the embedding, but {_TIED_READOUT} "
                f"differs from {_EMBEDDING}; set tie_word_embeddings to false"
            )

    def _check_tensor(self, tensor: HfTensor) -> None:
        file = self._files[tensor.name]
        stored = file.tensors[tensor.name]
        if stored.shape != tensor.shape:
            raise CheckpointError(
                f"{file.path}: tensor {tensor.name} has shape {stored.shape}, and config.json asks "
                f"for {tensor.shape}; {CURE}"
            )
        if stored.dtype not in DTYPES:
            raise CheckpointError(
                f"{file.path}: tensor {tensor.name} is {stored.dtype}; supported: "
                f"{', '.join(DTYPES)} (quantized weights must be dequantized first)"
            )
