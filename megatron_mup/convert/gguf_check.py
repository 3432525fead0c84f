"""What llama.cpp's converter makes of an exported folder: a GGUF architecture, or a refusal.

The converter itself (``convert_hf_to_gguf.py``) belongs to llama.cpp and is not run here. It knows
Llama and Granite; its Granite ignores ``head_dim`` and takes hidden_size / num_attention_heads. Of
the multipliers, ``logit_scale`` is what the logits are divided by, as ``logits_scaling`` is.
Source: llama.cpp, conversion/granite.py and src/models/granite.cpp.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mup.convert.formats import HfFormat
from megatron_mup.errors import CheckpointError

_MULTIPLIERS = {
    "attention_multiplier": "granite.attention.scale",
    "embedding_multiplier": "granite.embedding_scale",
    "residual_multiplier": "granite.residual_scale",
    "logits_scaling": "granite.logit_scale",
}


@dataclass(frozen=True, kw_only=True)
class GgufTarget:
    """What a folder becomes.

    Attributes:
        architecture: ``general.architecture`` of the GGUF file.
        multipliers: metadata keys and their values; float32 in the file.
    """

    architecture: str
    multipliers: Mapping[str, float]


def gguf_target(folder: Path) -> GgufTarget:
    """Find what llama.cpp's converter makes of an exported folder.

    Args:
        folder: what ``write_huggingface`` made.

    Returns:
        The architecture and the multipliers.

    Raises:
        CheckpointError: the converter cannot hold the model, or would change its function.
    """
    path = folder / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}; export the model again") from error
    kind = config.get("model_type")
    if kind == HfFormat.LLAMA:
        return GgufTarget(architecture="llama", multipliers={})
    if kind != HfFormat.GRANITE:
        raise CheckpointError(
            f"{path}: llama.cpp's converter does not know the model type {kind!r}; export with "
            "--format granite or --format llama if they can hold the model"
        )
    _check_granite(config, path)
    multipliers = {key: float(config[name]) for name, key in _MULTIPLIERS.items()}
    return GgufTarget(architecture="granite", multipliers=multipliers)


def gguf_line(folder: Path) -> str:
    """Say in one line what GGUF an exported folder becomes, or why none.

    Args:
        folder: what ``write_huggingface`` made.

    Returns:
        For the user; a model that GGUF cannot hold is no error of the export.
    """
    try:
        target = gguf_target(folder)
    except CheckpointError as error:
        return f"GGUF: not from this folder: {error}"
    scales = "".join(f", {key} {value:g}" for key, value in target.multipliers.items())
    return (
        f"GGUF: llama.cpp's convert_hf_to_gguf.py makes general.architecture "
        f"{target.architecture} of it{scales}"
    )


def _check_granite(config: Mapping[str, Any], path: Path) -> None:
    width, heads = config["hidden_size"], config["num_attention_heads"]
    if config.get("head_dim", width // heads) * heads != width:
        raise CheckpointError(
            f"{path}: llama.cpp's Granite takes {width} / {heads} as the head dim and ignores "
            f"head_dim={config['head_dim']}; export with --format llama"
        )
    zero = [name for name in _MULTIPLIERS if config[name] == 0]
    if zero:
        raise CheckpointError(
            f"{path}: {', '.join(zero)} is 0, which llama.cpp reads as unset; export with "
            "--format llama"
        )
