"""What no forward pass on a text can see fails by the comparison of tensors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_mup.convert.formats import HfFormat
from megatron_mup.convert.megatron_forward import single_rank
from megatron_mup.convert.rescaling import RescaledWeights, plain_multipliers
from megatron_mup.convert.transformers_forward import ExportedFolder
from megatron_mup.convert.verification import verify_export, verify_rewrite
from megatron_mup.convert.verification_text import CheckedTokens
from tests.convert.memory_weights import MemoryWeights, random_weights, small_model
from tests.convert.plain_folders import edit_config, save_folder

TEXT = CheckedTokens(
    ids=torch.randint(0, 60, (2, 24), generator=torch.Generator().manual_seed(3)),
    origin="ids below 60",
)
"""Of the 90 ids of ``small_model``, so that rows of the embedding are never read."""


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    """Megatron's groups for all tests here: making them takes longer than a forward pass."""
    with single_rank(small_model()):
        yield


def flip_unseen_rows(tensors: dict[str, Tensor]) -> None:
    rows = tensors["model.embed_tokens.weight"]
    rows[60:90] = rows[60:90].flip(0) * 7


def spoil_all_but_the_readout(tensors: dict[str, Tensor]) -> None:
    for name, values in tensors.items():
        if name != "lm_head.weight":
            values.mul_(-3.3)


def zero_readout() -> MemoryWeights:
    source = random_weights(small_model())
    source.tensors["output_layer.weight"].zero_()
    return source


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wrong_rows_of_ids_that_the_text_lacks_fail(dtype: torch.dtype, tmp_path: Path) -> None:
    source = random_weights(small_model())
    exported = save_folder(source, tmp_path, dtype=dtype, edit=flip_unseen_rows)
    report = verify_export(source, tmp_path, tokens=TEXT, exported=exported)
    assert [check.passed for check in report.checks] == [True, True]
    # 30 rows of 32.
    assert report.wrong_tensors == (
        "model.embed_tokens.weight: 960 of 3072 elements are not the cast of the source "
        "(model.safetensors)",
    )
    assert not report.passed
    assert report.compared_tensors == 21


def test_everything_wrong_behind_a_zero_readout_fails(tmp_path: Path) -> None:
    source = zero_readout()
    exported = save_folder(source, tmp_path, HfFormat.LLAMA, edit=spoil_all_but_the_readout)
    report = verify_export(source, tmp_path, tokens=TEXT, exported=exported)
    assert [check.passed for check in report.checks] == [True, True]
    assert report.uniform
    assert len(report.wrong_tensors) == 20
    assert not report.passed


def test_a_right_export_of_a_zero_readout_passes_by_its_tensors_alone(tmp_path: Path) -> None:
    source = zero_readout()
    exported = save_folder(source, tmp_path)
    report = verify_export(source, tmp_path, tokens=TEXT, exported=exported)
    assert report.passed
    assert "every log p is -log V (a zero readout)" in report.render()
    assert not verify_export(source, tmp_path, tokens=TEXT).passed
    # A readout that is merely small says something.
    source.tensors["output_layer.weight"].normal_(std=1e-3)
    assert not verify_export(source, tmp_path, tokens=TEXT).uniform


def test_a_wrong_attention_multiplier_behind_zero_queries_fails(tmp_path: Path) -> None:
    source = random_weights(small_model())
    for name, values in source.tensors.items():
        if name.endswith(".query"):
            values.zero_()
    exported = save_folder(source, tmp_path)
    edit_config(tmp_path, attention_multiplier=0.25)
    report = verify_export(source, tmp_path, tokens=TEXT, exported=exported)
    assert [check.passed for check in report.checks] == [True, True]
    # 1.1/D of heads of 8.
    assert report.wrong_tensors == ("config.json: attention multiplier 0.25 instead of 0.1375",)
    assert not report.passed


def imported(folder: Path) -> tuple[RescaledWeights, MemoryWeights]:
    """A Llama folder taken over into multipliers, and what was written of it."""
    model = small_model()
    published = random_weights(model, plain_multipliers(model))
    save_folder(published, folder, HfFormat.LLAMA)
    expected = RescaledWeights(published, model, random_weights(model).multipliers)
    tensors = {name: expected.read(name) for name in published.tensors}
    return expected, MemoryWeights(model, expected.multipliers, tensors)


def test_an_import_is_compared_with_what_was_written(tmp_path: Path) -> None:
    expected, written = imported(tmp_path)
    folder = ExportedFolder(tmp_path)
    told: list[str] = []
    report = verify_export(written, folder, tokens=TEXT, expected=expected, progress=told.append)
    assert report.passed, report.render()
    assert report.compared_tensors == 21
    assert told[0] == "comparing the tensors of memory bit for bit"
    written.tensors["embedding.word_embeddings.weight"][70, 3] += 1e-6
    report = verify_export(written, folder, tokens=TEXT, expected=expected)
    assert [check.passed for check in report.checks] == [True, True]
    assert report.wrong_tensors == (
        "embedding.word_embeddings.weight: 1 of 3072 elements are not what was converted",
    )
    assert not report.passed


def test_a_rewrite_is_compared_with_what_was_written(tmp_path: Path) -> None:
    expected, written = imported(tmp_path)
    report = verify_rewrite(expected, written, tokens=TEXT, expected=expected)
    assert report.passed
    assert report.compared_tensors == 21
    written.tensors["embedding.word_embeddings.weight"][70, 3] += 1e-6
    report = verify_rewrite(expected, written, tokens=TEXT, expected=expected)
    assert all(check.passed for check in report.checks)
    assert not report.passed
    assert verify_rewrite(expected, written, tokens=TEXT).passed
