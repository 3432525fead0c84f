"""Weights of an export that changed since are noticed, file by file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_mup.convert.commands import app
from megatron_mup.convert.inspection import inspect_checkpoint
from megatron_mup.convert.inspection_report import inspection_text
from megatron_mup.convert.weight_checksums import changed_weights
from megatron_mup.errors import CheckpointError, MupError
from tests.convert.command_calls import call
from tests.convert.small_checkpoints import GQA, MakeCheckpoint


def export(checkpoint: Path, folder: Path, *words: str) -> Path:
    line = ("to-hf", "--load", checkpoint, "--output", folder, "--format", "granite")
    assert call(app, *line, "--max-shard-size", "100KB", *words).exit_code == 0
    return folder


@pytest.fixture
def exported(checkpoint_of: MakeCheckpoint, tmp_path: Path) -> Path:
    return export(checkpoint_of(*GQA), tmp_path / "hf", "--no-verify")


def flip_last_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def header_of(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header: dict[str, Any] = json.loads(content[8 : 8 + length])
    return header


def test_an_export_without_a_list_of_tensors_is_named_by_its_file(exported: Path) -> None:
    first = sorted(exported.glob("*.safetensors"))[0]
    flip_last_bit(first)
    (exported / "tensor_checksums.json").unlink()
    (problem,) = changed_weights(exported)
    assert problem.endswith("its SHA-256 is not that of the export.")


def test_an_export_lists_the_sha256_of_its_weights(exported: Path) -> None:
    weights = sorted(exported.glob("*.safetensors"))
    assert len(weights) > 1
    index = exported / "model.safetensors.index.json"
    assert json.loads((exported / "checksums.json").read_text())["files"] == {
        path.name: {
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in (*weights, index)
    }


def test_an_import_refuses_weights_with_a_flipped_bit_and_names_the_file(
    exported: Path, tmp_path: Path
) -> None:
    words = ("from-hf", "--input", exported, "--no-verify", "--save")
    second = sorted(exported.glob("*.safetensors"))[1]
    flip_last_bit(second)
    # The flipped bit is the file's last: of the tensor that ends there.
    begins_and_ends = {
        name: tensor["data_offsets"]
        for name, tensor in header_of(second).items()
        if name != "__metadata__"
    }
    last = max(begins_and_ends, key=lambda name: begins_and_ends[name][1])
    expected = rf"{second.name} was changed.* Changed in it: the tensors {last}\.\n.*--no-check"
    with pytest.raises(MupError, match=expected):
        call(app, *words, tmp_path / "in")
    assert not (tmp_path / "in").exists()
    assert call(app, *words, tmp_path / "in", "--no-check").exit_code == 0


def test_a_whole_export_is_compared_and_imported(exported: Path, tmp_path: Path) -> None:
    # The author of a model edits these.
    for name in ("README.md", "generation_config.json"):
        (exported / name).write_text("{}")
    words = ("from-hf", "--input", exported, "--no-verify", "--save")
    result = call(app, *words, tmp_path / "in")
    assert result.exit_code == 0
    assert f"comparing the SHA-256 of the weights of {exported}" in result.stderr.replace("\n", "")
    (exported / "checksums.json").unlink()
    result = call(app, *words, tmp_path / "second")
    assert result.exit_code == 0
    assert "SHA-256" not in result.stderr


def test_cut_missing_and_unlisted_weights_are_named(exported: Path) -> None:
    first, second = sorted(exported.glob("*.safetensors"))[:2]
    first.write_bytes(first.read_bytes()[:-8])
    size = first.stat().st_size
    second.unlink()
    assert changed_weights(exported) == [
        f"{first} has {size} bytes instead of {size + 8}.",
        f"{second} cannot be read (No such file or directory).",
    ]


def test_a_list_that_cannot_be_read_is_named_with_the_cure(exported: Path) -> None:
    (exported / "checksums.json").write_text('{"format": 1, "files": {"../a": 1}}')
    with pytest.raises(CheckpointError, match=r"checksums.json cannot be used; fetch .*--no-check"):
        changed_weights(exported)
    (problem,) = inspect_checkpoint(exported, check=True).problems
    assert "checksums.json cannot be used" in problem


def test_inspection_compares_the_weights_when_asked(exported: Path) -> None:
    assert "contents were not compared" in inspection_text(inspect_checkpoint(exported))
    whole = inspection_text(inspect_checkpoint(exported, check=True))
    assert whole.endswith("whole: every weight file has its SHA-256, and every tensor is finite")
    victim = sorted(exported.glob("*.safetensors"))[1]
    flip_last_bit(victim)
    assert inspect_checkpoint(exported).problems == ()
    damaged = inspect_checkpoint(exported, check=True)
    (problem,) = damaged.problems
    assert problem.startswith(f"{victim} was changed: its SHA-256 is not that of the export. ")
    assert problem.endswith(
        "Changed in it: the tensors model.layers.1.post_attention_layernorm.weight."
    )
