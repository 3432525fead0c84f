"""What a verification reads: tokens of real text, and folders of which each fault has a name."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_mup.convert import remote_code
from megatron_mup.convert.formats import REMOTE_CODE, HfFormat
from megatron_mup.convert.huggingface_config import config_dict
from megatron_mup.convert.transformers_forward import ExportedFolder
from megatron_mup.convert.verification_report import (
    Check,
    Difference,
    VerificationReport,
)
from megatron_mup.convert.verification_text import (
    built_in_tokens,
    tokens_of_file,
    tokens_of_shards,
    tokens_of_text,
    uniform_tokens,
)
from megatron_mup.errors import CheckpointError, DataError
from tests.convert.memory_weights import random_weights, small_model, small_multipliers
from tests.convert.plain_folders import edit_config, save_folder
from tests.data.written_shards import write_own_shard

BYTES = small_model(vocab_size=256, seq_length=100)
"""A model whose tokens are the bytes of UTF-8."""


def as_bytes(text: str) -> list[int]:
    return list(text.encode())


def test_text_is_cut_into_sequences_of_the_models_length() -> None:
    found = tokens_of_text(BYTES, as_bytes, "abc" * 1000, origin="letters")
    assert found.ids.shape == (20, 100)
    assert found.ids.dtype is torch.int64
    assert found.ids[0, :4].tolist() == [97, 98, 99, 97]
    # A model of longer sequences than the text has tokens gets one sequence.
    assert tokens_of_text(BYTES, as_bytes, "seventeen letters", origin="").ids.shape == (1, 17)
    long = replace(BYTES, seq_length=8192)
    assert tokens_of_text(long, as_bytes, "abc" * 9000, origin="").ids.shape == (1, 2048)


def test_the_built_in_text_is_english_and_the_same_everywhere() -> None:
    found = built_in_tokens(BYTES, as_bytes)
    assert found.ids.numel() == 2000
    assert "statement" in bytes(found.ids.flatten().tolist()).decode()
    assert "Python" in found.origin


def test_a_file_and_the_shards_of_a_run_give_their_first_tokens(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("real words " * 300, encoding="utf-8")
    found = tokens_of_file(BYTES, as_bytes, tmp_path / "text.txt")
    assert bytes(found.ids[0, :10].tolist()) == b"real words"
    assert found.origin == "text.txt"
    write_own_shard(tmp_path / "valid", [list(range(130)), list(range(130, 250))])
    held_out = tokens_of_shards(BYTES, ["0.5", str(tmp_path / "valid"), "0.5", "nowhere"])
    assert held_out.ids.tolist() == [list(range(100)), list(range(100, 200))]


def test_ids_without_text_say_so() -> None:
    found = uniform_tokens(BYTES)
    assert "NOT text" in found.origin
    assert found.ids.numel() == 2000
    assert len(set(found.ids.flatten().tolist())) > 200
    assert int(found.ids.max()) < 256


def test_texts_that_cannot_be_checked_are_refused() -> None:
    with pytest.raises(DataError, match="1 tokens; the check needs at least 2"):
        tokens_of_text(BYTES, as_bytes, "a", origin="letter")
    with pytest.raises(DataError, match="token id 300 is outside the model's vocabulary of 256"):
        tokens_of_text(BYTES, lambda _: [1, 300], "a", origin="letter")
    with pytest.raises(DataError, match="cannot read the text missing"):
        tokens_of_file(BYTES, as_bytes, Path("missing"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A right folder; to be copied before it is changed."""
    folder = tmp_path_factory.mktemp("llama")
    save_folder(random_weights(small_model()), folder, HfFormat.LLAMA)
    return folder


def spoilt(right: Path, folder: Path) -> Path:
    return Path(shutil.copytree(right, folder / "spoilt"))


def test_missing_surplus_and_misshapen_tensors_are_named(llama: Path, tmp_path: Path) -> None:
    assert ExportedFolder(llama).misfits() == []
    folder = spoilt(llama, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:90].clone()
    tensors["model.extra"] = torch.zeros(2)
    # Old checkpoints hold what transformers recomputes.
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert ExportedFolder(folder).misfits() == [
        "model.norm.weight: missing",
        "lm_head.weight: shape [90, 32] instead of [96, 32]",
        "model.extra: the model has no such parameter",
    ]


def test_a_tied_matrix_may_be_stored_twice_but_not_as_two(tmp_path: Path) -> None:
    source = random_weights(small_model(untie_embeddings_and_output_weights=False))
    save_folder(source, tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    assert ExportedFolder(tmp_path).misfits() == []
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    assert ExportedFolder(tmp_path).misfits() == [
        "lm_head.weight: tied to model.embed_tokens.weight, but another tensor"
    ]


def test_damaged_and_missing_files_are_named(llama: Path, tmp_path: Path) -> None:
    folder = spoilt(llama, tmp_path)
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is cut: tensor "):
        ExportedFolder(folder)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"has neither model\.safetensors nor"):
        ExportedFolder(folder)
    index = folder / "model.safetensors.index.json"
    for places in ("{}", '{"weight_map": {"model.norm.weight": "../model.safetensors"}}'):
        index.write_text(places)
        with pytest.raises(CheckpointError, match=r"index\.json is damaged: it has no map"):
            ExportedFolder(folder)


def test_a_file_that_the_safetensors_library_refuses_is_named(llama: Path, tmp_path: Path) -> None:
    """Values are read by that library, as every user's are."""
    folder = ExportedFolder(spoilt(llama, tmp_path))
    file = folder.folder / "model.safetensors"
    file.write_bytes(b"x" * 50)
    with pytest.raises(CheckpointError, match=r"safetensors: cannot read the tensor model\.norm"):
        folder.read("model.norm.weight")


def test_a_folder_without_a_model_of_transformers_is_refused(llama: Path, tmp_path: Path) -> None:
    folder = spoilt(llama, tmp_path)
    edit_config(folder, model_type="unheard_of")
    with pytest.raises(CheckpointError, match=r"transformers cannot read .*unheard_of"):
        ExportedFolder(folder)
    (folder / "config.json").write_text("no json")
    with pytest.raises(CheckpointError, match=r"config\.json is damaged"):
        ExportedFolder(folder)


def test_code_that_is_not_this_packages_is_not_run(tmp_path: Path) -> None:
    model = small_model()
    config = config_dict(HfFormat.MEGATRON_MUP, model, small_multipliers(model), dtype="float32")
    (tmp_path / "config.json").write_text(json.dumps(config))
    for name in REMOTE_CODE:
        shutil.copy(Path(remote_code.__file__).with_name(name), tmp_path)
    marker = tmp_path / "was-run"
    with (tmp_path / REMOTE_CODE[1]).open("a") as stream:
        stream.write(f"\nopen({str(marker)!r}, 'w').close()\n")
    with pytest.raises(CheckpointError, match=r"not this package's.*--trust-remote-code"):
        ExportedFolder(tmp_path)
    on_the_hub = {"AutoConfig": "someone/model--configuration_megatron_mup.MegatronMupConfig"}
    edit_config(tmp_path, auto_map=on_the_hub)
    with pytest.raises(CheckpointError, match="someone/model--"):
        ExportedFolder(tmp_path)
    edit_config(tmp_path, auto_map="configuration_megatron_mup")
    with pytest.raises(CheckpointError, match="auto_map is 'configuration_megatron_mup'"):
        ExportedFolder(tmp_path)
    assert not marker.exists()


def report_of(
    difference: Difference, mean: float, maximum: float, **fields: Any
) -> VerificationReport:
    check = Check(
        name="float32",
        compared="one against the other",
        difference=difference,
        mean_limit=mean,
        maximum_limit=maximum,
        because="chosen",
        yardstick=difference,
        source_nats=1.5,
        other_nats=2.25,
    )
    values = {
        "source": "checkpoint",
        "other": "folder",
        "other_forward": "transformers",
        "text": "text",
        "sequences": 2,
        "sequence_length": 4,
        "checks": (check,),
        "compared_tensors": 0,
        "wrong_tensors": (),
    }
    return VerificationReport(**{**values, **fields})


def test_differences_are_located() -> None:
    one = torch.zeros(2, 3, dtype=torch.float64)
    other = torch.tensor([[0.0, 0.25, 0.0], [0.0, 0.25, -0.375]], dtype=torch.float64)
    found = Difference.between(one, other)
    assert (found.mean, found.maximum) == (0.875 / 6, 0.375)
    assert (found.worst_sequence, found.worst_position, found.worst_mean_position) == (1, 3, 2)
    spans = [(part.first, part.last, part.mean, part.maximum) for part in found.positions]
    assert spans == [(1, 1, 0.0, 0.0), (2, 3, 0.875 / 4, 0.375)]
    assert report_of(found, 0.15, 0.375).passed
    assert not report_of(found, 0.15, 0.374).passed
    report = report_of(found, 0.14, 0.375)
    assert not report.passed
    assert "FAILED: folder against checkpoint" in report.render()
    assert "sequence 1 at position 3" in report.render()
    named = "mean -log p in float32: 1.500000 nats of checkpoint, 2.250000 of folder"
    assert named in report.render()
    assert report.to_json()["checks"][0]["difference"]["positions"][1]["maximum"] == 0.375


def test_a_difference_that_is_no_number_fails() -> None:
    nothing = torch.zeros(1, 2, dtype=torch.float64)
    assert report_of(Difference.between(nothing, nothing), 0.0, 0.0).passed
    report = report_of(Difference.between(nothing, nothing * torch.nan), 1.0, 1.0)
    assert not report.passed
    assert json.loads(json.dumps(report.to_json(), allow_nan=False))["passed"] is False


def test_a_check_that_could_not_fail_passes_only_with_compared_tensors() -> None:
    nothing = Difference.between(torch.zeros(1, 2), torch.zeros(1, 2))
    blind = report_of(nothing, 1.0, 1.0, uniform=True)
    assert not blind.passed
    assert "every log p is -log V (a zero readout)" in blind.render()
    assert "no tensors were compared" in blind.render()
    compared = report_of(nothing, 1.0, 1.0, uniform=True, compared_tensors=21)
    assert compared.passed
    assert "tensors: 21 compared bit for bit" in compared.render()
    assert "the tensors are what was checked" in compared.render()
    assert "zero readout" not in report_of(nothing, 1.0, 1.0).render()
