"""Preprocessing of every kind of input, whole and damaged."""

from __future__ import annotations

import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from megatron_mup.data.manifest import JobManifest, read_shard_manifest
from megatron_mup.data.preprocess import PreprocessOptions, preprocess
from megatron_mup.data.schedule import Part
from megatron_mup.data.tokenizer import Tokenizer
from megatron_mup.errors import DataError

TEXTS = [f"Document {number}\nwith \u00e9 and {'x' * number}\r\n" for number in range(60)]


def json_lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def parquet(texts: list[str]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": texts, "id": range(len(texts))}), sink, row_group_size=7)
    return bytes(sink.getvalue())


WRITERS: dict[str, Callable[[list[str]], bytes]] = {
    "a.jsonl": json_lines,
    "a.jsonl.gz": lambda texts: gzip.compress(json_lines(texts)),
    "a.jsonl.zst": lambda texts: zstandard.compress(json_lines(texts)),
    "a.jsonl.xz": lambda texts: lzma.compress(json_lines(texts)),
    "a.parquet": parquet,
}


def run(
    inputs: list[str | Path], prefix: Path, tokenizer: Tokenizer, **options: object
) -> JobManifest:
    chosen = PreprocessOptions(**{"valid_fraction": 0.0, "unit_bytes": 700, **options})
    manifest = preprocess(inputs, prefix, tokenizer=tokenizer, options=chosen)
    assert isinstance(manifest, JobManifest)
    return manifest


def decoded(upstream: ModuleType, tokenizer: Tokenizer, prefix: Path) -> list[str]:
    dataset = upstream.IndexedDataset(str(prefix))
    return [tokenizer.decode(dataset[number][:-1].tolist()) for number in range(len(dataset))]


@pytest.mark.parametrize("name", list(WRITERS))
def test_every_format_gives_the_documents_in_order(
    tmp_path: Path, tokenizer: Tokenizer, upstream: ModuleType, name: str
) -> None:
    (tmp_path / name).write_bytes(WRITERS[name](TEXTS))
    run([tmp_path / name], tmp_path / "s", tokenizer)
    assert decoded(upstream, tokenizer, tmp_path / "s") == TEXTS


def test_files_of_all_formats_in_a_folder_are_read_in_the_order_of_their_names(
    tmp_path: Path, tokenizer: Tokenizer, upstream: ModuleType
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for number, (name, write) in enumerate(WRITERS.items()):
        (folder / name.replace("a.", f"{number}.")).write_bytes(write(TEXTS[number::5]))
    (folder / "9.txt").write_bytes(b"One text\r\nwith two lines")
    manifest = run([folder], tmp_path / "s", tokenizer, workers=2)
    expected = [text for number in range(5) for text in TEXTS[number::5]]
    expected.append("One text\r\nwith two lines")
    assert decoded(upstream, tokenizer, tmp_path / "s") == expected
    assert [Path(name).name for name in manifest.inputs] == [
        "0.jsonl",
        "1.jsonl.gz",
        "2.jsonl.zst",
        "3.jsonl.xz",
        "4.parquet",
        "9.txt",
    ]
    assert [part.documents for part in read_shard_manifest(tmp_path / "s.json").inputs] == [
        12
    ] * 5 + [1]


CUT = {
    "a.jsonl.gz": lambda raw: raw[: len(raw) // 2],
    "a.jsonl.xz": lambda raw: raw[: len(raw) // 2],
    "a.jsonl.zst": lambda raw: raw[: len(raw) - 3],
    "a.parquet": lambda raw: raw[:4] + bytes([255] * 8) + raw[12:],
    "b.parquet": lambda raw: raw[:-30] + raw[-10:],
}


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("name", list(CUT))
def test_a_damaged_file_is_named_or_left_out_and_counted(
    tmp_path: Path, tokenizer: Tokenizer, upstream: ModuleType, name: str, workers: int
) -> None:
    (tmp_path / "0.jsonl").write_bytes(json_lines(TEXTS[:3]))
    raw = WRITERS["a" + name[1:]](TEXTS)
    (tmp_path / name).write_bytes(CUT[name](raw))
    inputs: list[str | Path] = [tmp_path / "0.jsonl", tmp_path / name]
    with pytest.raises(DataError, match=rf"{name}.*(again|iconv)"):
        run(inputs, tmp_path / "s", tokenizer, workers=workers)
    assert not list(tmp_path.glob("s.*idx"))
    manifest = run(inputs, tmp_path / "s", tokenizer, workers=workers, skip_bad=True)
    assert sum(manifest.rejected_documents.values()) >= 1
    assert all(name in place for place in manifest.rejected_places)
    found = decoded(upstream, tokenizer, tmp_path / "s")
    assert found[:3] == TEXTS[:3]
    # What is left of the file is whole documents in order.
    rest = iter(TEXTS)
    assert all(text in rest for text in found[3:])


def test_a_column_that_is_not_there_is_said_before_any_work(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    (tmp_path / "a.parquet").write_bytes(parquet(TEXTS))
    with pytest.raises(DataError, match=r"a\.parquet.*content.*text"):
        run([tmp_path / "a.parquet"], tmp_path / "s", tokenizer, json_key="content")
    assert not (tmp_path / "s.work").exists()


def test_a_large_document_is_refused_or_left_out(
    tmp_path: Path, tokenizer: Tokenizer, upstream: ModuleType
) -> None:
    texts = [*TEXTS[:5], "y" * 5000, *TEXTS[5:10]]
    for name in ("a.jsonl", "a.jsonl.gz", "a.parquet"):
        (tmp_path / name).write_bytes(WRITERS[name](texts))
        with pytest.raises(DataError, match=r"more than the limit of 3000.*--max-document-bytes"):
            run([tmp_path / name], tmp_path / f"{name}-s", tokenizer, max_document_bytes=3000)
        manifest = run(
            [tmp_path / name],
            tmp_path / f"{name}-s",
            tokenizer,
            max_document_bytes=3000,
            skip_bad=True,
        )
        assert manifest.rejected_documents == {"too_large": 1}
        assert f"{name}:6" in manifest.rejected_places[0]
        assert decoded(upstream, tokenizer, tmp_path / f"{name}-s") == TEXTS[:10]


def test_standard_input_cannot_be_divided(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="standard input cannot be read in parts"):
        run(["-"], tmp_path / "s", tokenizer, part=Part(1, 2))
