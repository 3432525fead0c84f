"""Exports against the tables of the ``gguf`` package, which llama.cpp's converter works with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest

from megatron_mup.config import Activation
from megatron_mup.convert.formats import HfFormat
from megatron_mup.convert.gguf_check import gguf_line, gguf_target
from megatron_mup.convert.huggingface_target import write_huggingface
from megatron_mup.convert.safetensors_shards import SafetensorsFile
from megatron_mup.errors import CheckpointError
from megatron_mup.parameterization.evaluation import Multipliers
from tests.convert.memory_weights import random_weights, small_model
from tests.convert.plain_folders import edit_config

MULTIPLIERS = Multipliers(embedding=3.0, attention=0.125, residual=0.5, logit=0.25)


def exported(folder: Path, hf_format: HfFormat, **options: Any) -> Path:
    weights = random_weights(small_model(**options), MULTIPLIERS)
    write_huggingface(weights, folder / "model", hf_format=hf_format)
    return folder / "model"


@pytest.mark.parametrize(
    ("hf_format", "architecture"),
    [
        (HfFormat.LLAMA, gguf.MODEL_ARCH.LLAMA),
        (HfFormat.GRANITE, gguf.MODEL_ARCH.GRANITE),
    ],
)
@pytest.mark.parametrize(
    "options", [{}, {"untie_embeddings_and_output_weights": False}, {"add_bias_linear": True}]
)
def test_every_exported_tensor_has_a_place_in_gguf(
    tmp_path: Path, hf_format: HfFormat, architecture: gguf.MODEL_ARCH, options: dict[str, Any]
) -> None:
    folder = exported(tmp_path, hf_format, **options)
    target = gguf_target(folder)
    names = gguf.get_tensor_name_map(architecture, 2)

    assert target.architecture == gguf.MODEL_ARCH_NAMES[architecture]
    places = [
        names.get_name(name, try_suffixes=(".weight", ".bias"))
        for name in SafetensorsFile(folder / "model.safetensors").tensors
    ]
    assert None not in places
    assert len(set(places)) == len(places)


def test_every_multiplier_of_a_granite_has_a_key(tmp_path: Path) -> None:
    target = gguf_target(exported(tmp_path, HfFormat.GRANITE))

    # Logits are divided by logit_scale: 1 / 0.25.
    assert target.multipliers == {
        gguf.Keys.Attention.SCALE.format(arch="granite"): 0.125,
        gguf.Keys.LLM.EMBEDDING_SCALE.format(arch="granite"): 3.0,
        gguf.Keys.LLM.RESIDUAL_SCALE.format(arch="granite"): 0.5,
        gguf.Keys.LLM.LOGIT_SCALE.format(arch="granite"): 4.0,
    }


def test_a_llama_needs_no_multipliers(tmp_path: Path) -> None:
    assert gguf_target(exported(tmp_path, HfFormat.LLAMA)).multipliers == {}


def test_models_that_llama_cpp_would_change_are_refused(tmp_path: Path) -> None:
    remote = exported(tmp_path / "a", HfFormat.MEGATRON_MUP, activation=Activation.RELU)
    with pytest.raises(CheckpointError, match="does not know the model type 'megatron_mup'"):
        gguf_target(remote)
    wide = exported(tmp_path / "b", HfFormat.GRANITE, kv_channels=16)
    with pytest.raises(CheckpointError, match=r"takes 32 / 4 as the head dim .* head_dim=16"):
        gguf_target(wide)
    edit_config(wide, head_dim=8, residual_multiplier=0)
    with pytest.raises(CheckpointError, match=r"residual_multiplier is 0, .* reads as unset"):
        gguf_target(wide)
    (wide / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"cannot read .*config.json: Expecting"):
        gguf_target(wide)


def test_users_are_told_what_gguf_a_folder_becomes_or_why_none(tmp_path: Path) -> None:
    maker = "GGUF: llama.cpp's convert_hf_to_gguf.py makes general.architecture"
    assert gguf_line(exported(tmp_path / "a", HfFormat.LLAMA)) == f"{maker} llama of it"
    assert gguf_line(exported(tmp_path / "b", HfFormat.GRANITE)) == (
        f"{maker} granite of it, granite.attention.scale 0.125, granite.embedding_scale 3, "
        "granite.residual_scale 0.5, granite.logit_scale 4"
    )
    wide = gguf_line(exported(tmp_path / "c", HfFormat.GRANITE, kv_channels=16))
    assert wide.startswith("GGUF: not from this folder: ")
    assert wide.endswith("ignores head_dim=16; export with --format llama")
