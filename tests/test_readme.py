"""The README is true: its table is the code's, its tree exists, its commands run."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from megatron_mup.describe import rule_table_markdown

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHORT = {
    "make quickstart": [
        "megatron-mup quickstart --widths 32,64 --log2-lrs=-8,-5,-2 --steps 10 --seeds 1 "
        "--out quickstart"
    ],
    # CI's own call of `make check` runs this target.
    "make test": [],
}


def commands() -> list[str]:
    """Command lines of the README's bash blocks, without comments."""
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    return [re.sub(r"\s+#.*$", "", line) for line in lines if line.strip()]


def test_rule_table_is_generated_from_the_rules() -> None:
    marked = re.search(r"<!-- rule table: .*? -->\n(.*?)\n<!-- end", README, flags=re.DOTALL)
    assert marked is not None
    assert marked.group(1) == rule_table_markdown()


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 200


def test_every_linked_file_and_every_name_of_the_tree_exists() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    tree = re.search(r"## Tree\n\n```\n(.*?)```", README, flags=re.DOTALL)
    assert tree is not None
    names, folder = [], ""
    for line in tree.group(1).splitlines():
        name = line.split()[0]
        if line.startswith("  "):
            names.append(folder + name)
        else:
            names.append(name)
            folder = name
    missing = [name for name in [*links, *names] if not (ROOT / name).exists()]
    assert not missing


def test_make_targets_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = [line.split()[1] for line in commands() if line.startswith("make ")]
    assert targets == ["quickstart", "test"]
    for target in targets:
        assert re.search(rf"^{target}: venv", makefile, flags=re.MULTILINE)


@pytest.fixture(scope="module")
def folder_with_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder with the examples and some real text of the standard library."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("examples", "launch"):
        (folder / name).symlink_to(ROOT / name)
    texts = [Path(path).read_text(encoding="utf-8") for path in (textwrap.__file__, json.__file__)]
    texts += [Path(module.__file__ or "").read_text("utf-8") for module in (re, shlex, subprocess)]
    paragraphs = [part for text in texts for part in text.split("\n\n")]
    with (folder / "documents.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": part}) + "\n" for part in paragraphs)
    return folder


@pytest.mark.dist
def test_every_command_of_the_readme_runs(folder_with_text: Path) -> None:
    lines = [short for line in commands() for short in SHORT.get(line, [line])]
    assert len(lines) >= 8
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    outputs = {}
    for line in lines:
        done = subprocess.run(
            shlex.split(line),
            cwd=folder_with_text,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        outputs[line] = done.stdout
    quickstart = next(text for line, text in outputs.items() if " quickstart " in line)
    assert "| mup | 64 |" in quickstart
    picture = folder_with_text / "quickstart" / "report" / "figures" / "loss_curves.png"
    assert picture.read_bytes()[:4] == b"\x89PNG"
    trained = [text for line, text in outputs.items() if "first_run" in line and "train" in line]
    finals = [re.findall(r"lm loss validation (\d\.\d+)", text)[-1] for text in trained]
    # One process, two tensor-parallel ranks and a watched run print the same held-out loss.
    assert len(finals) == 3
    assert [float(final) for final in finals] == pytest.approx([float(finals[0])] * 3, abs=2e-4)
    plot = next(text for line, text in outputs.items() if line.startswith("megatron-mup plot"))
    assert "dynamics.png" in plot
