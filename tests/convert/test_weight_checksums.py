"""Weights of an export that changed since are noticed, file by file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

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
    with pytest.raises(MupError, match=rf"{second.name} was changed.*\n.*--no-check"):
        call(app, *words, tmp_path / "in")
    assert list((tmp_path / "in").iterdir()) == []
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
    assert damaged.problems == (f"{victim} was changed: its SHA-256 is not that of the export.",)
