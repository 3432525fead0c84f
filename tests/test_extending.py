"""docs/extending.md, followed to the letter in a copy of the package."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.spawn import ROOT

_DOCUMENT = ROOT / "docs" / "extending.md"
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[str]:
    """The document's code blocks of one language, in order."""
    text = _DOCUMENT.read_text(encoding="utf-8")
    return [code for found, code in _BLOCK.findall(text) if found == language]


def hunks(block: str) -> list[tuple[str, str, str]]:
    """(path, old text, new text) of each hunk of a diff block."""
    result = []
    for file in re.split(r"^--- ", block, flags=re.MULTILINE)[1:]:
        path, _, body = file.partition("\n")
        for hunk in re.split(r"^@@\n", body, flags=re.MULTILINE)[1:]:
            lines = hunk.splitlines()
            old = "".join(line[1:] + "\n" for line in lines if not line.startswith("+"))
            new = "".join(line[1:] + "\n" for line in lines if not line.startswith("-"))
            result.append((path, old, new))
    return result


def followed(folder: Path) -> Path:
    """A copy of the package with everything done that the document says."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "megatron_mup", folder / "megatron_mup", ignore=ignored)
    for code in blocks("python"):
        path = code.partition("\n")[0].removeprefix("# ")
        (folder / path).write_text(code, encoding="utf-8")
    for block in blocks("diff"):
        for path, old, new in hunks(block):
            text = (folder / path).read_text(encoding="utf-8")
            assert text.count(old) == 1, f"{path} has not exactly one place for:\n{old}"
            (folder / path).write_text(text.replace(old, new), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the probe finds in the copy."""
    folder = followed(tmp_path_factory.mktemp("extended"))
    output = folder / "found.json"
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}",
    }
    shown = subprocess.run(
        [sys.executable, "-m", "tests.extension_probe", str(output)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert shown.returncode == 0, shown.stderr[-3000:]
    found = json.loads(output.read_text(encoding="utf-8"))
    assert found["package"] == str(folder / "megatron_mup")
    return found


def test_every_hunk_of_the_document_has_one_place_in_the_package() -> None:
    found = [hunk for block in blocks("diff") for hunk in hunks(block)]
    assert len(found) >= 12
    for path, old, _ in found:
        assert old.strip(), f"a hunk for {path} says nothing of its place"
        assert (ROOT / path).read_text(encoding="utf-8").count(old) == 1, (path, old)


def test_new_tensor_has_the_row_that_the_document_gives_it(extended: Any) -> None:
    row = extended["layer"]["row"]
    # M 64 over P 32: std 64^-1/2, LR 2^-6 / 2.
    assert (row["role"], row["shape"], row["fan_in"]) == ("head_gate", [4, 64], 64)
    assert (row["init_std"], row["lr"], row["base_fan_in"]) == (0.125, 2**-7, 32)
    assert "head_gate" in extended["layer"]["described"][0]


def test_new_tensor_is_drawn_grouped_and_trained(extended: Any) -> None:
    layer = extended["layer"]
    # Standard error of the std of 256 normal values: 4.4%.
    assert layer["std"] == pytest.approx(0.125, rel=0.15)
    assert layer["rate"] == 2**-7
    # From zero, Adam's first step is the learning rate.
    assert layer["moved"] == pytest.approx(2**-7, rel=0.01)


def test_gates_of_zero_weight_let_every_head_through(extended: Any) -> None:
    losses = extended["layer"]["losses"]
    assert losses["opened"] == pytest.approx(losses["without"], rel=1e-6)
    assert abs(losses["drawn"] - losses["without"]) > 1e-3


def test_tensor_without_a_row_is_refused_in_the_words_of_the_document(extended: Any) -> None:
    promised = next(text for text in blocks("text") if "has no role" in text)
    assert extended["layer"]["forgotten"] == " ".join(promised.split())


def test_option_is_refused_where_the_hook_would_read_something_else(extended: Any) -> None:
    assert "transformer_impl=local" in extended["layer"]["transformer_engine"]


def test_new_optimizer_has_the_learning_rates_of_its_paper(extended: Any) -> None:
    rates = extended["optimizer"]["rates"]
    # alpha 2^-6, m 2: input weights alpha m, hidden matrices alpha, readout alpha / m.
    assert rates["embedding.word_embeddings.weight"] == 2**-5
    hidden = {rate for name, rate in rates.items() if "linear_" in name}
    assert hidden == {2**-6}
    assert rates["output_layer.weight"] == 2**-7
    assert "2203.03466" in extended["optimizer"]["sources"]["embedding"]


def test_new_optimizer_steps_by_learning_rate_times_gradient(extended: Any) -> None:
    assert extended["optimizer"]["kinds"] == ["SGD"]
    # Rounding of weights of up to 4.
    assert extended["optimizer"]["error"] < 5e-7
    assert extended["optimizer"]["moved"] > 1e-3


def test_new_optimizer_is_refused_where_it_has_no_rules(extended: Any) -> None:
    assert "name=mup or sp" in extended["optimizer"]["absolute"]
    assert "weight_decay is 0.1" in extended["optimizer"]["decay"]
