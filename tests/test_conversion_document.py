"""docs/conversion.md is true: its commands run, and its table of factors is the code's."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from megatron_mup.data.tokenizer_training import TokenizerOptions, train_tokenizer
from tests.convert.small_checkpoints import GQA, save_small

ROOT = Path(__file__).parents[1]
DOCUMENT = (ROOT / "docs" / "conversion.md").read_text(encoding="utf-8")


def blocks() -> list[str]:
    return re.findall(r"<!-- run -->\n```(?:bash|python)\n(.*?)```", DOCUMENT, flags=re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run and the tokenizer that the document names."""
    folder = tmp_path_factory.mktemp("conversion")
    text = Path(sysconfig.get_paths()["stdlib"]) / "heapq.py"
    options = TokenizerOptions(vocab_size=420, held_out_fraction=0.0)
    train_tokenizer([text], folder / "demo", options=options)
    save_small(folder / "runs" / "demo", *GQA, "vocab_size=420", "seq_length=64")
    return folder


def run(block: str, folder: Path) -> str:
    path = [str(Path(sys.executable).parent), os.environ["PATH"]]
    words = ["python", "-c", block] if block.startswith("from ") else ["bash", "-euc", block]
    done = subprocess.run(
        words,
        cwd=folder,
        env={**os.environ, "PATH": os.pathsep.join(path), "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{block}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.dist
def test_every_command_block_of_the_document_runs(folder: Path) -> None:
    assert len(blocks()) == 5
    output = "".join(run(block, folder) for block in blocks())
    # Two exports, an import, and the standard parameterization.
    assert output.count("Verification passed") == 4
    assert "FAILED" not in output


def test_the_document_is_short() -> None:
    assert len(DOCUMENT.splitlines()) < 200
