"""Log-probabilities from transformers' own code, with tensors read one at a time.

Whoever downloads an exported folder runs exactly this: its config.json, transformers' model class
(or the modeling file beside the weights) and its safetensors files. There must be no forward code
of this package here, or the comparison would prove nothing.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_mup import platform
from megatron_mup.convert.huggingface_folder import (
    CONFIG_FILE,
    CURE,
    HuggingFaceFolder,
    is_file_name,
    read_json,
)
from megatron_mup.convert.huggingface_source import COMPUTED
from megatron_mup.convert.layerwise import (
    Fetch,
    blocks_of,
    sliced_logprobs,
    streamed,
    without_weights,
)
from megatron_mup.convert.remote_code import check_transformers
from megatron_mup.convert.safetensors_shards import DTYPES, FileTensor
from megatron_mup.errors import CheckpointError

ATTENTION = "sdpa"
"""Attention implementation of transformers that is checked: its default, and the only one besides
eager that every machine has."""

_READOUT = "lm_head"


class ExportedFolder:
    """A folder that ``AutoModelForCausalLM`` can load.

    Args:
        folder: with config.json and safetensors files.
        trust_remote_code: run modeling files of the folder even if they are not this package's.

    Raises:
        CheckpointError: a file is missing or damaged, holds a dtype that is not checked, or the
            folder wants foreign code to be run.
        InstallationError: transformers is not installed.
    """

    def __init__(self, folder: Path, *, trust_remote_code: bool = False) -> None:
        check_transformers()
        import transformers

        self.folder = folder
        self._trust = trust_remote_code or _has_only_our_code(folder)
        try:
            self._config: Any = transformers.AutoConfig.from_pretrained(
                folder, trust_remote_code=self._trust
            )
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"transformers cannot read {folder / CONFIG_FILE}: {error}"
            ) from error
        self._files = HuggingFaceFolder(folder).files
        self.tensors: Mapping[str, FileTensor] = {
            name: file.tensors[name] for name, file in self._files.items()
        }
        if not self.tensors:
            raise CheckpointError(f"{folder} holds no tensors")
        for name, stored in self.tensors.items():
            if stored.dtype not in DTYPES:
                raise CheckpointError(
                    f"{self._files[name].path}: the tensor {name} is {stored.dtype}; only "
                    f"{', '.join(DTYPES)} can be checked"
                )

    @property
    def dtype(self) -> torch.dtype:
        """The least precise dtype of the files."""
        kinds = {DTYPES[stored.dtype] for stored in self.tensors.values()}
        return min(kinds, key=lambda dtype: (dtype.itemsize, str(dtype)))

    def file_name(self, name: str) -> str:
        """The file that holds a tensor."""
        return self._files[name].path.name

    def read(self, name: str) -> Tensor:
        """One tensor as it is stored.

        Raises:
            CheckpointError: it is missing or its file is damaged.
        """
        if name not in self.tensors:
            raise CheckpointError(f"{self.folder}: no file holds the tensor {name}")
        file = self._files[name].path
        # Not with this package's reader, which could share a mistake with its writer.
        from safetensors import SafetensorError, safe_open

        # Opened for each tensor: pages of a file that stays mapped count as this process's memory.
        try:
            with safe_open(file, framework="pt") as tensors:
                values: Tensor = tensors.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file}: cannot read the tensor {name}: {error}") from error
        return values

    def build(self, dtype: torch.dtype) -> torch.nn.Module:
        """transformers' model of this folder in a dtype, without weights."""
        import transformers

        with without_weights():
            model: torch.nn.Module = transformers.AutoModelForCausalLM.from_config(
                self._config,
                dtype=dtype,
                attn_implementation=ATTENTION,
                trust_remote_code=self._trust,
            )
        return model.eval()

    def misfits(self) -> list[str]:
        """Tensors that the files lack, have too many, or have in another shape; a line for each."""
        model = self.build(torch.float32)
        wanted = dict(model.named_parameters())
        names = dict(model.named_parameters(remove_duplicate=False))
        lines = [f"{name}: missing" for name in wanted if name not in self.tensors]
        for name, stored in self.tensors.items():
            if name in wanted and tuple(wanted[name].shape) != stored.shape:
                shape = list(wanted[name].shape)
                lines.append(f"{name}: shape {list(stored.shape)} instead of {shape}")
            elif name not in wanted and not name.endswith(COMPUTED):
                line = self._surplus(name, names, wanted)
                lines += [line] if line else []
        return lines

    def _surplus(
        self,
        name: str,
        names: Mapping[str, torch.nn.Parameter],
        wanted: Mapping[str, torch.nn.Parameter],
    ) -> str | None:
        first = [other for other in wanted if names.get(name) is wanted[other]]
        if not first:
            return f"{name}: the model has no such parameter"
        # Some checkpoints store a tied matrix twice.
        if first[0] in self.tensors and torch.equal(self.read(name), self.read(first[0])):
            return None
        return f"{name}: tied to {first[0]}, but another tensor"


@torch.no_grad()
def transformers_logprobs(
    folder: ExportedFolder, tokens_BS: Tensor, *, dtype: torch.dtype, fetch: Fetch | None = None
) -> Tensor:
    """Log-probabilities of the next tokens under transformers' forward pass.

    Args:
        folder: config.json, and the tensors unless ``fetch`` is given.
        tokens_BS: int64 ids [B, S].
        dtype: of the weights and the computation, e.g. float32, float64, bfloat16.
        fetch: reads a tensor by its name in transformers; unset means from the folder's files.

    Returns:
        float64 [B, S - 1] on the CPU.

    Raises:
        CheckpointError: a tensor is missing, damaged or of another shape.
    """
    model: Any = folder.build(dtype)
    device = platform.device()
    tokens_BS = tokens_BS.to(device)
    weights = fetch or folder.read
    with streamed(model, blocks_of(model), weights, device=device, kept=_READOUT):
        hidden = model.base_model(input_ids=tokens_BS, use_cache=False)
        # The readout with all that follows it is the class's own code, given what is known already.
        model.base_model.forward = lambda *_inputs, **_options: hidden

        def logits_at(first: int, last: int) -> Tensor:
            kept = torch.arange(first, last, device=device)
            logits_BPV: Tensor = model(
                input_ids=tokens_BS, use_cache=False, logits_to_keep=kept
            ).logits
            return logits_BPV

        return sliced_logprobs(logits_at, tokens_BS, vocabulary=model.config.vocab_size)


def _has_only_our_code(folder: Path) -> bool:
    """Whether the folder needs code of its own, and that is this package's, byte for byte.

    Raises:
        CheckpointError: it needs other code.
    """
    path = folder / CONFIG_FILE
    auto_map = read_json(path).get("auto_map")
    if not auto_map:
        return False
    if not isinstance(auto_map, dict):
        raise CheckpointError(f"{path} is damaged: auto_map is {auto_map!r}; {CURE}")
    ours = importlib.resources.files("megatron_mup.convert.remote_code")
    for reference in auto_map.values():
        # "owner/repository--file.Class" names code on the hub.
        name = f"{str(reference).rpartition('.')[0]}.py"
        packaged, here = ours / name, folder / name
        same = packaged.is_file() and here.is_file() and packaged.read_bytes() == here.read_bytes()
        if not (is_file_name(name) and same):
            raise CheckpointError(
                f"{path} asks to run code that is not this package's "
                f"({reference}); read it, and pass --trust-remote-code if you trust it"
            )
    return True
