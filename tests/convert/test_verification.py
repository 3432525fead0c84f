"""The check at the end of a conversion passes for right exports and fails for every wrong one.

The folders are written by transformers itself, so that nothing of this package's writer is in them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_mup.config import ModelConfig
from megatron_mup.convert import remote_code
from megatron_mup.convert.formats import REMOTE_CODE, HfFormat, hf_name
from megatron_mup.convert.huggingface_config import config_dict
from megatron_mup.convert.megatron_forward import single_rank
from megatron_mup.convert.rescaling import RescaledWeights, plain_multipliers
from megatron_mup.convert.verification import verify_export, verify_rewrite
from megatron_mup.convert.verification_report import VerificationReport
from megatron_mup.convert.verification_text import CheckedTokens
from megatron_mup.convert.weights import WeightSource
from megatron_mup.errors import CheckpointError
from megatron_mup.parameterization.roles import NormGain, logical_tensors
from tests.convert.memory_weights import (
    MemoryWeights,
    random_weights,
    small_model,
    small_multipliers,
)
from tests.convert.plain_folders import edit_config, save_folder

HEAD = 8
"""Head dim of ``small_model``: 32 / 4."""

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    """Megatron's groups for all tests here: making them takes longer than a forward pass."""
    with single_rank(small_model()):
        yield


def tokens(model: ModelConfig, *, sequences: int = 6) -> CheckedTokens:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, model.vocab_size, (sequences, model.seq_length), generator=generator)
    return CheckedTokens(ids=ids, origin="random ids")


def verified(source: WeightSource, folder: Path, **options: Any) -> VerificationReport:
    return verify_export(source, folder, tokens=tokens(source.model), **options)


MODELS: dict[str, dict[str, Any]] = {
    "grouped": {},
    "all heads, tied": {
        "num_query_groups": None,
        "untie_embeddings_and_output_weights": False,
    },
    "one key head, no gains, biases": {
        "num_query_groups": 1,
        "norm_gain": NormGain.NONE,
        "add_bias_linear": True,
    },
    "tied, scalar gains": {
        "untie_embeddings_and_output_weights": False,
        "norm_gain": NormGain.SCALAR,
    },
}


@pytest.mark.parametrize("hf_format", [HfFormat.LLAMA, HfFormat.GRANITE])
@pytest.mark.parametrize("name", MODELS)
def test_right_exports_pass(name: str, hf_format: HfFormat, tmp_path: Path) -> None:
    source = random_weights(small_model(**MODELS[name]))
    save_folder(source, tmp_path, hf_format)
    report = verified(source, tmp_path)
    assert report.passed, report.render()
    full, low = report.checks
    assert (full.name, low.name) == ("float32", "bfloat16")
    assert full.difference.mean < 1e-6
    assert (full.mean_limit, full.maximum_limit) == (1e-5, 4 * full.yardstick.maximum)
    # bf16 has 8 bits: nothing as small as fp32's would have been computed in it.
    assert low.difference.mean > 1e-4
    assert low.mean_limit == 2 * low.yardstick.mean
    assert low.maximum_limit == 3 * low.yardstick.maximum


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_right_exports_in_16_bits_pass_and_every_tensor_of_the_files_is_compared(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    source = random_weights(small_model())
    exported = save_folder(source, tmp_path, HfFormat.LLAMA, dtype=dtype)
    report = verified(source, tmp_path, exported=exported)
    assert report.passed, report.render()
    assert report.checks[1].name == str(dtype).removeprefix("torch.")
    # Embedding, readout, final norm and 9 tensors in each of 2 layers.
    assert report.compared_tensors == 21


@pytest.mark.usefixtures("own_modules")
def test_the_modeling_file_beside_the_weights_is_what_runs(tmp_path: Path) -> None:
    source = random_weights(small_model(norm_gain=NormGain.SCALAR, embedding_norm=True))
    save_own(source, tmp_path)
    report = verified(source, tmp_path)
    assert report.passed, report.render()
    edit_config(tmp_path, logit_multiplier=1.0)
    assert not verified(source, tmp_path).checks[0].passed


def save_own(source: MemoryWeights, folder: Path) -> None:
    """A folder of this package's own model class."""
    save_file(
        {hf_name(t): source.read(t.name) for t in logical_tensors(source.model.shape)},
        folder / "model.safetensors",
    )
    config = config_dict(HfFormat.MEGATRON_MUP, source.model, source.multipliers, dtype="float32")
    (folder / "config.json").write_text(json.dumps(config))
    for name in REMOTE_CODE:
        shutil.copy(Path(remote_code.__file__).with_name(name), folder)


WRONG_CONFIGS: dict[str, dict[str, Any]] = {
    "logits scale lost": {"logits_scaling": 1.0},
    "attention by 1/sqrt(D)": {"attention_multiplier": HEAD**-0.5},
    "residual multiplier lost": {"residual_multiplier": 1.0},
    "embedding multiplier twice": {"embedding_multiplier": 3.1 * 3.1},
    "multiplier 0.1% off": {"residual_multiplier": 0.7007},
    "norm epsilon of another": {"rms_norm_eps": 1e-3},
    "another base of RoPE": {"rope_parameters": {"rope_type": "default", "rope_theta": 510.0}},
}


@pytest.fixture(scope="module")
def granite(tmp_path_factory: pytest.TempPathFactory) -> tuple[MemoryWeights, Path]:
    """A right Granite folder and its source; to be copied before it is changed."""
    source, folder = random_weights(small_model()), tmp_path_factory.mktemp("granite")
    save_folder(source, folder)
    return source, folder


@pytest.mark.parametrize("mistake", WRONG_CONFIGS)
def test_wrong_configurations_fail(
    mistake: str, granite: tuple[MemoryWeights, Path], tmp_path: Path
) -> None:
    source, right = granite
    folder = Path(shutil.copytree(right, tmp_path / "wrong"))
    edit_config(folder, **WRONG_CONFIGS[mistake])
    report = verified(source, folder)
    assert not report.passed
    assert not report.checks[0].passed
    assert report.wrong_tensors == ()


def swap_heads(tensors: Tensors, kind: str, one: int, other: int) -> None:
    weight = tensors[f"model.layers.0.self_attn.{kind}_proj.weight"]
    rows = weight.view(-1, HEAD, weight.shape[1])
    rows[[one, other]] = rows[[other, one]]


def interleave_rope(tensors: Tensors) -> None:
    """The rows as RoPE of neighbouring pairs wants them, in all layers."""
    for name, weight in tensors.items():
        if "q_proj" in name or "k_proj" in name:
            halves = weight.view(-1, 2, HEAD // 2, weight.shape[1])
            weight.copy_(halves.transpose(1, 2).reshape(weight.shape))


def zero_norm(tensors: Tensors) -> None:
    tensors["model.layers.1.input_layernorm.weight"].zero_()


def exchange_layers(tensors: Tensors) -> None:
    for name in [name for name in tensors if ".layers.0." in name]:
        other = name.replace(".layers.0.", ".layers.1.")
        tensors[name], tensors[other] = tensors[other], tensors[name]


def swap_gate_and_up(tensors: Tensors) -> None:
    gate, up = (f"model.layers.1.mlp.{kind}_proj.weight" for kind in ("gate", "up"))
    tensors[gate], tensors[up] = tensors[up], tensors[gate]


def scale_embedding_again(tensors: Tensors) -> None:
    tensors["model.embed_tokens.weight"].mul_(3.1)


def forget_padding(tensors: Tensors) -> None:
    """Rows of ids that no text has still count in the softmax."""
    tensors["lm_head.weight"][90:] = 0.0


WRONG_TENSORS: dict[str, Callable[[Tensors], None]] = {
    # Heads 0 and 1 are one group: keys and values fit either.
    "queries of a group swapped": lambda tensors: swap_heads(tensors, "q", 0, 1),
    "keys of two groups swapped": lambda tensors: swap_heads(tensors, "k", 0, 1),
    "values of two groups swapped": lambda tensors: swap_heads(tensors, "v", 0, 1),
    "interleaved RoPE rows": interleave_rope,
    "gain written as zeros": zero_norm,
    "layers exchanged": exchange_layers,
    "gate and up exchanged": swap_gate_and_up,
    "embedding scaled twice": scale_embedding_again,
    "padding rows forgotten": forget_padding,
}


@pytest.mark.parametrize("mistake", WRONG_TENSORS)
def test_wrong_tensors_fail(mistake: str, tmp_path: Path) -> None:
    source = random_weights(small_model())
    save_folder(source, tmp_path, HfFormat.LLAMA, edit=WRONG_TENSORS[mistake])
    report = verified(source, tmp_path)
    assert not report.passed
    assert not report.checks[0].passed


def test_a_gain_free_model_with_gains_of_zero_fails(tmp_path: Path) -> None:
    source = random_weights(small_model(norm_gain=NormGain.NONE))
    save_folder(source, tmp_path, edit=zero_norm)
    assert not verified(source, tmp_path).checks[0].passed


def test_a_wrong_tied_flag_fails(tmp_path: Path) -> None:
    untied = random_weights(small_model())
    save_folder(untied, tmp_path / "untied")
    edit_config(tmp_path / "untied", tie_word_embeddings=True)
    report = verified(untied, tmp_path / "untied")
    assert not report.checks[0].passed
    assert "lm_head.weight: tied to model.embed_tokens.weight" in report.render()
    tied = random_weights(small_model(untie_embeddings_and_output_weights=False))
    exported = save_folder(tied, tmp_path / "tied", dtype=torch.bfloat16)
    edit_config(tmp_path / "tied", tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"no file holds the tensor lm_head\.weight"):
        verified(tied, tmp_path / "tied")
    with pytest.raises(CheckpointError, match=r"nothing for transformers' tensor lm_head\.weight"):
        verified(tied, tmp_path / "tied", exported=exported)


def test_a_wrong_rotation_shows_more_at_later_positions(tmp_path: Path) -> None:
    source = random_weights(small_model(seq_length=64))
    save_folder(source, tmp_path)
    rope = {"rope_type": "default", "rope_theta": 510.0}
    edit_config(tmp_path, rope_parameters=rope)
    found = verified(source, tmp_path).checks[0].difference
    assert [(part.first, part.last) for part in found.positions] == [
        (1, 1),
        (2, 3),
        (4, 7),
        (8, 15),
        (16, 31),
        (32, 63),
    ]
    # The first token is rotated by nothing and attends to itself alone.
    assert found.positions[0].maximum < 1e-5
    assert found.positions[-1].mean > 5 * found.positions[1].mean
    assert found.worst_position > 8


def test_one_element_that_is_not_the_cast_of_the_source_is_named(tmp_path: Path) -> None:
    source = random_weights(small_model())
    exported = save_folder(source, tmp_path, dtype=torch.bfloat16)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    # One unit in the last place: no forward pass could tell.
    tensors[name].view(torch.int16)[5, 7] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    report = verified(source, tmp_path, exported=exported)
    assert [check.passed for check in report.checks] == [True, True]
    assert report.wrong_tensors == (
        f"{name}: 1 of 1536 elements are not the cast of the source (model.safetensors)",
    )
    assert not report.passed


def test_an_error_of_a_single_token_shows_in_the_maximum(tmp_path: Path) -> None:
    def change_one_row(tensors: Tensors) -> None:
        tensors["model.embed_tokens.weight"][77] *= 1.001

    source = random_weights(small_model())
    save_folder(source, tmp_path, edit=change_one_row)
    checked = tokens(source.model)
    checked.ids[checked.ids == 77] = 76
    checked.ids[2, -2] = 77
    check = verify_export(source, tmp_path, tokens=checked).checks[0]
    assert check.difference.mean < check.mean_limit
    assert (check.difference.worst_sequence, check.difference.worst_position) == (2, 23)
    assert not check.passed


def test_a_model_of_large_logits_is_measured_by_its_own_rounding(tmp_path: Path) -> None:
    model = small_model(num_layers=8, untie_embeddings_and_output_weights=False)
    source = random_weights(model, replace(small_multipliers(model), logit=40.0))
    save_folder(source, tmp_path, HfFormat.LLAMA)
    check = verified(source, tmp_path).checks[0]
    assert check.difference.mean > 1e-5
    assert check.mean_limit == 4 * check.yardstick.mean
    assert check.passed


def test_files_that_lost_bits_fail_in_their_own_precision(tmp_path: Path) -> None:
    def to_three_bits(tensors: Tensors) -> None:
        for tensor in tensors.values():
            tensor.copy_(tensor.to(torch.float8_e4m3fn))

    source = random_weights(small_model())
    exported = save_folder(source, tmp_path, dtype=torch.bfloat16, edit=to_three_bits)
    report = verified(source, tmp_path, exported=exported)
    # The exporter's arithmetic was right: only its files are not.
    assert [check.passed for check in report.checks] == [True, False]
    assert len(report.wrong_tensors) == 21


def test_an_import_is_checked_by_the_same_function(tmp_path: Path) -> None:
    """The folder is the reference, the converted weights the other side; files in bf16."""
    model = small_model()
    published = random_weights(model, plain_multipliers(model))
    for tensor in published.tensors.values():
        tensor.copy_(tensor.bfloat16())
    save_folder(published, tmp_path, HfFormat.LLAMA, dtype=torch.bfloat16)
    imported = RescaledWeights(published, model, small_multipliers(model))
    report = verified(imported, tmp_path)
    assert report.passed, report.render()
    assert report.compared_tensors == 0
    published.tensors["decoder.final_layernorm.weight"][0] *= 1.01
    assert not verified(imported, tmp_path).checks[0].passed


@pytest.mark.parametrize("name", ["grouped", "tied, scalar gains"])
def test_weights_for_other_multipliers_are_compared_under_megatron(name: str) -> None:
    source = random_weights(small_model(**MODELS[name]))
    model = source.model
    plain = RescaledWeights(source, model, plain_multipliers(model))
    report = verify_rewrite(source, plain, tokens=tokens(model))
    assert report.passed, report.render()
    assert 0 < report.checks[0].difference.mean < 1e-6
    # The weights as they are, under multipliers that they were not made for.
    wrong = MemoryWeights(model, plain.multipliers, source.tensors)
    assert not verify_rewrite(source, wrong, tokens=tokens(model)).checks[0].passed


def test_what_is_done_is_told(tmp_path: Path) -> None:
    source = random_weights(small_model())
    save_folder(source, tmp_path)
    told: list[str] = []
    verified(source, tmp_path, progress=told.append)
    assert told == [
        "Megatron: forward pass in float32",
        "transformers: forward pass in float32",
        "transformers: forward pass in float64",
        "Megatron: forward pass in bfloat16",
        "transformers: forward pass in bfloat16",
    ]
