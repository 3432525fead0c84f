"""docs/preprocessing.md is true: its commands run, its files exist, its reasons are all there."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from megatron_mup.data.documents import BadReason

ROOT = Path(__file__).parents[1]
DOCUMENT = (ROOT / "docs" / "preprocessing.md").read_text(encoding="utf-8")

# Takes the launch script as a shell would, and whatever it submits as if a Slurm were there.
SBATCH = """#!/usr/bin/env bash
echo "sbatch $*" >> sbatch.log
[[ $1 == --parsable ]] && echo 4711 || exec bash "$@"
"""


def blocks() -> list[str]:
    return re.findall(r"```bash\n(.*?)```", DOCUMENT, flags=re.DOTALL)


def paragraphs() -> list[str]:
    texts = [Path(module.__file__ or "").read_text("utf-8") for module in (re, json, textwrap)]
    texts += [Path(subprocess.__file__).read_text("utf-8"), Path(gzip.__file__).read_text("utf-8")]
    parts = [part for text in texts for part in text.split("\n\n") if part]
    return list(dict.fromkeys(parts))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the inputs that the document names, and a stand-in for Slurm."""
    folder = tmp_path_factory.mktemp("preprocessing")
    for name in ("tools", "launch"):
        (folder / name).symlink_to(ROOT / name)
    lines = [json.dumps({"text": part}) + "\n" for part in paragraphs()]
    (folder / "documents.jsonl").write_text("".join(lines), "utf-8")
    (folder / "dirty.jsonl").write_text("".join([*lines[:100], "{broken\n", *lines[100:]]), "utf-8")
    books = folder / "corpus" / "books"
    books.mkdir(parents=True)
    for number, part in enumerate(paragraphs()[:40]):
        (books / f"{number}.txt").write_text(part, "utf-8")
    for name, part_lines in (("a", lines[::2]), ("b", [*lines[1::2], lines[0]])):
        with gzip.open(folder / "corpus" / f"{name}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(part_lines)
    sbatch = folder / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(SBATCH)
    sbatch.chmod(0o755)
    return folder


def run(block: str, folder: Path) -> str:
    path = [str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block],
        cwd=folder,
        env={
            **{name: value for name, value in os.environ.items() if not name.startswith("SLURM")},
            "PATH": os.pathsep.join(path),
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{block}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def manifest(folder: Path, prefix: str) -> dict[str, dict[str, list[dict[str, int]]]]:
    record: dict[str, dict[str, list[dict[str, int]]]]
    record = json.loads((folder / "shards" / f"{prefix}.manifest.json").read_text())
    return record


def documents(folder: Path, prefix: str) -> int:
    splits = manifest(folder, prefix)["splits"].values()
    return sum(shard["documents"] for shards in splits for shard in shards)


@pytest.mark.dist
def test_every_command_block_of_the_document_runs(folder: Path) -> None:
    assert len(blocks()) >= 7
    outputs = "".join(run(block, folder) for block in blocks())
    count = len(paragraphs())
    assert documents(folder, "text") == count
    # The copies in the folder of books and in the second file are left out.
    assert documents(folder, "many") == count
    assert documents(folder, "piped") == len(paragraphs()[::2])
    assert documents(folder, "parts") == count + 1 + 40
    assert documents(folder, "megatron") == count
    assert manifest(folder, "clean")["rejected_documents"] == {"broken_json": 1}
    assert len(manifest(folder, "many")["splits"]["train"]) > 1
    assert {path.suffix for path in (folder / "shards").glob("megatron.*")} >= {".bin", ".idx"}
    assert "OK      " in outputs
    assert "DAMAGED" not in outputs
    blend = json.loads((folder / "shards" / "blend.json").read_text())
    assert set(blend) >= {"train", "valid"}
    # The user's own call, the array and the last job.
    submitted = (folder / "sbatch.log").read_text().splitlines()
    assert len(submitted) == 3
    assert "--array=0-3" in submitted[1]
    assert "afterany:4711" in submitted[2]


def test_every_reason_for_a_bad_document_is_in_its_table() -> None:
    found = re.findall(r"^\| `(\w+)` \|", DOCUMENT, flags=re.MULTILINE)
    assert found == [reason.value for reason in BadReason]


def test_every_file_that_the_document_links_or_names_exists() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", DOCUMENT) if "://" not in link]
    assert links
    named = set(re.findall(r"`?((?:launch|tools)/[\w./]+)", DOCUMENT))
    assert named >= {"launch/preprocess.sh", "tools/preprocess_data.py"}
    assert [name for name in links if not (ROOT / "docs" / name).exists()] == []
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_document_is_short() -> None:
    assert len(DOCUMENT.splitlines()) < 200
