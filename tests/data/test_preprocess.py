from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import random
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mup.data.documents import is_held_out
from megatron_mup.data.engines import EngineOption
from megatron_mup.data.manifest import JobManifest
from megatron_mup.data.preprocess import PreprocessOptions, preprocess
from megatron_mup.data.schedule import Part, Progress, Tally
from megatron_mup.data.tokenizer import Tokenizer
from megatron_mup.data.work_folder import WorkFolder
from megatron_mup.errors import DataError

ONE_SHARD = PreprocessOptions(valid_fraction=0.0, overwrite=True)
# Many units and shards of little text.
CUT = PreprocessOptions(valid_fraction=0.2, test_fraction=0.1, shard_tokens=9000, unit_bytes=8000)


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    return path


def megatron_documents(upstream: ModuleType, prefix: Path) -> list[list[int]]:
    dataset = upstream.IndexedDataset(str(prefix))
    assert dataset.document_indices.tolist() == list(range(len(dataset) + 1))
    return [dataset[number].tolist() for number in range(len(dataset))]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def made(
    inputs: list[str | Path], folder: Path, tokenizer: Tokenizer, **changes: object
) -> dict[str, bytes]:
    """The files that a whole job with the options CUT makes."""
    options = dataclasses.replace(CUT, **changes)
    result = preprocess(inputs, folder / "s", tokenizer=tokenizer, options=options)
    assert isinstance(result, JobManifest)
    return contents(folder)


@settings(max_examples=40, deadline=None)
@given(texts=st.lists(st.text(min_size=1), min_size=1, max_size=5))
def test_megatron_reads_back_every_document_in_order(
    tokenizer: Tokenizer,
    upstream: ModuleType,
    tmp_path_factory: pytest.TempPathFactory,
    texts: list[str],
) -> None:
    folder = tmp_path_factory.mktemp("shard")
    path = write_jsonl(folder / "a.jsonl", texts)
    options = dataclasses.replace(ONE_SHARD, unit_bytes=30)
    preprocess([path], folder / "s", tokenizer=tokenizer, options=options)
    documents = megatron_documents(upstream, folder / "s")
    assert [document[-1] for document in documents] == [2] * len(texts)
    assert [tokenizer.decode(document[:-1]) for document in documents] == texts


def test_a_whole_shard_equals_that_of_megatrons_builder(
    tmp_path: Path, tokenizer: Tokenizer, upstream: ModuleType, jsonl: Path
) -> None:
    builder = upstream.IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype=np.uint16)
    for line in jsonl.read_text("utf-8").splitlines():
        ids = [*tokenizer.encode(json.loads(line)["text"]), 2]
        builder.add_document(np.array(ids), [len(ids)])
    builder.finalize(str(tmp_path / "m.idx"))
    preprocess([jsonl], tmp_path / "s", tokenizer=tokenizer, options=ONE_SHARD)
    assert (tmp_path / "s.bin").read_bytes() == (tmp_path / "m.bin").read_bytes()
    assert (tmp_path / "s.idx").read_bytes() == (tmp_path / "m.idx").read_bytes()


def test_the_split_goes_by_hash_and_loses_nothing(
    tmp_path: Path, tokenizer: Tokenizer, upstream: ModuleType, jsonl: Path
) -> None:
    options = PreprocessOptions(valid_fraction=0.2, test_fraction=0.1)
    manifest = preprocess([jsonl], tmp_path / "s", tokenizer=tokenizer, options=options)
    assert isinstance(manifest, JobManifest)
    assert {
        split: [shard.name for shard in shards] for split, shards in manifest.splits.items()
    } == {
        "train": ["s_train"],
        "valid": ["s_valid"],
        "test": ["s_test"],
    }
    texts = [json.loads(line)["text"] for line in jsonl.read_text("utf-8").splitlines()]
    # The share of a hash below 0.2, from there to 0.3, and above.
    below = {limit: {text for text in texts if is_held_out(text, limit)} for limit in (0.2, 0.3)}
    expected = {
        "valid": below[0.2],
        "test": below[0.3] - below[0.2],
        "train": set(texts) - below[0.3],
    }
    for split, members in expected.items():
        documents = megatron_documents(upstream, tmp_path / f"s_{split}")
        decoded = [tokenizer.decode(ids) for ids in documents]
        assert decoded == [text for text in texts if text in members]
    assert 0.1 < manifest.splits["valid"][0].documents / len(texts) < 0.3


def test_the_manifest_describes_the_shard(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["", "\n\n\n", "\n\u00e9"])
    preprocess([path], tmp_path / "s", tokenizer=tokenizer, options=ONE_SHARD)
    raw, index = (tmp_path / "s.bin").read_bytes(), (tmp_path / "s.idx").read_bytes()
    # The lines are {"text": ""} and {"text": "\n\n\n"}, with the newlines written out.
    ranges = [{"file": str(path), "start": 13, "stop": 32, "documents": 2}]
    assert json.loads((tmp_path / "s.json").read_text()) == {
        "format_version": 2,
        "documents": 2,
        "tokens": len(raw) // 2,
        "text_bytes": 6,
        "largest_token_id": max(tokenizer.encode("\u00e9")),
        "dtype": "uint16",
        "bin_bytes": len(raw),
        "bin_sha256": hashlib.sha256(raw).hexdigest(),
        "idx_sha256": hashlib.sha256(index).hexdigest(),
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": 512,
        "eod": 2,
        "append_eod": True,
        "inputs": ranges,
    }
    job = json.loads((tmp_path / "s.manifest.json").read_text())
    assert (job["empty_documents"], job["inputs"]) == (1, [str(path)])
    assert not (tmp_path / "s.work").exists()


def test_the_end_of_document_can_be_left_out(
    tmp_path: Path, tokenizer: Tokenizer, upstream: ModuleType
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["\n", "\n\n"])
    options = PreprocessOptions(valid_fraction=0.0, append_eod=False)
    preprocess([path], tmp_path / "s", tokenizer=tokenizer, options=options)
    assert megatron_documents(upstream, tmp_path / "s") == [[3], [3, 3]]


@pytest.fixture(scope="module")
def whole(
    jsonl: Path, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """What one process makes of the corpus in one go."""
    folder = tmp_path_factory.mktemp("whole")
    return made([jsonl], folder, tokenizer, engine=EngineOption.reference)


def test_a_corpus_becomes_many_shards(whole: dict[str, bytes]) -> None:
    names = [name for name in whole if name.startswith("s_train")]
    count = len(names) // 3
    assert count > 3
    assert names == [
        f"s_train-{number:05d}-of-{count:05d}.{end}"
        for number in range(count)
        for end in ("bin", "idx", "json")
    ]
    assert {len(whole[name]) <= 18000 for name in names if name.endswith(".bin")} == {True}


@pytest.mark.parametrize(
    "change", [{"workers": 3}, {"engine": EngineOption.gigatoken, "workers": 2}]
)
def test_output_does_not_depend_on_workers_or_engine(
    tmp_path: Path,
    tokenizer: Tokenizer,
    jsonl: Path,
    whole: dict[str, bytes],
    change: dict[str, object],
) -> None:
    assert made([jsonl], tmp_path, tokenizer, **change) == whole


def test_parts_on_any_machine_give_the_same_bytes(
    tmp_path: Path, tokenizer: Tokenizer, jsonl: Path, whole: dict[str, bytes]
) -> None:
    done = []
    for number in (3, 1, 2):
        options = dataclasses.replace(CUT, part=Part(number, 3))
        tally = preprocess([jsonl], tmp_path / "s", tokenizer=tokenizer, options=options)
        assert isinstance(tally, Tally)
        done.append(tally.units)
        assert not list(tmp_path.glob("s_*"))
    # Every unit was done by one of them.
    assert min(done) > 2
    assert sum(done) == -(-jsonl.stat().st_size // 8000)
    assert made([jsonl], tmp_path, tokenizer) == whole


def test_a_missing_part_is_done_by_the_last_call(
    tmp_path: Path, tokenizer: Tokenizer, jsonl: Path, whole: dict[str, bytes]
) -> None:
    options = dataclasses.replace(CUT, part=Part(2, 3))
    preprocess([jsonl], tmp_path / "s", tokenizer=tokenizer, options=options)
    assert made([jsonl], tmp_path, tokenizer) == whole


@pytest.mark.parametrize("workers", [1, 2])
def test_a_compressed_file_gives_the_same_tokens(
    tmp_path: Path, tokenizer: Tokenizer, jsonl: Path, whole: dict[str, bytes], workers: int
) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(jsonl.read_bytes()))
    found = made([tmp_path / "a.jsonl.gz"], tmp_path / "out", tokenizer, workers=workers)
    ends = (".bin", ".idx")
    assert {k: v for k, v in found.items() if k.endswith(ends)} == {
        k: v for k, v in whole.items() if k.endswith(ends)
    }


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_document_stops_the_run_and_publishes_nothing(
    tmp_path: Path, tokenizer: Tokenizer, workers: int
) -> None:
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": f"document {number}"}) for number in range(300)]
    path.write_text("\n".join([*lines, "broken"]))
    options = PreprocessOptions(workers=workers, unit_bytes=2000)
    with pytest.raises(DataError, match=r"a\.jsonl:301: .*JSON.*--on-error skip"):
        preprocess([path], tmp_path / "out/s", tokenizer=tokenizer, options=options)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["s.work"]


def test_bad_documents_can_be_left_out_and_are_counted_with_their_places(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    good = [json.dumps({"text": f"document {number}"}) for number in range(50)]
    lines = [*good[:20], "broken", *good[20:40], '{"other": 1}', "", *good[40:]]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    options = PreprocessOptions(valid_fraction=0.0, skip_bad=True, unit_bytes=200)
    manifest = preprocess(
        [tmp_path / "a.jsonl"], tmp_path / "s", tokenizer=tokenizer, options=options
    )
    assert isinstance(manifest, JobManifest)
    assert manifest.splits["train"][0].documents == 50
    assert manifest.rejected_documents == {"broken_json": 1, "no_field": 1}
    first, second = manifest.rejected_places
    assert "a.jsonl:21" in first
    assert "a.jsonl:42" in second


def test_a_run_that_stopped_goes_on_when_bad_documents_are_left_out(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    lines = [json.dumps({"text": f"document {number}"}) for number in range(50)]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, "broken"]))
    options = PreprocessOptions(valid_fraction=0.0, unit_bytes=200)
    with pytest.raises(DataError, match="broken"):
        preprocess([tmp_path / "a.jsonl"], tmp_path / "s", tokenizer=tokenizer, options=options)
    finished = list((tmp_path / "s.work/units").glob("*.unit"))
    assert len(finished) > 3
    before = {path: path.stat().st_mtime_ns for path in finished}
    units = tmp_path / "s.work/units"
    skipping = dataclasses.replace(options, skip_bad=True, part=Part(1, 1))
    preprocess([tmp_path / "a.jsonl"], tmp_path / "s", tokenizer=tokenizer, options=skipping)
    assert {path: path.stat().st_mtime_ns for path in finished} == before
    assert len(list(units.glob("*.unit"))) == len(finished) + 1


@pytest.mark.parametrize("options", [{"deduplicate": True}, {"valid_fraction": 0.5}])
def test_copies_and_splits_go_by_the_whole_text(
    tmp_path: Path, tokenizer: Tokenizer, options: dict[str, object]
) -> None:
    texts = [f"{number} {'the same end ' * 50}" for number in range(20)]
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    asked = dataclasses.replace(ONE_SHARD, **options)
    manifest = preprocess([path], tmp_path / "s", tokenizer=tokenizer, options=asked)
    assert isinstance(manifest, JobManifest)
    held_out = sum(is_held_out(text, asked.valid_fraction) for text in texts)
    found = {
        name: sum(shard.documents for shard in split) for name, split in manifest.splits.items()
    }
    assert found == ({"train": 20 - held_out, "valid": held_out} if held_out else {"train": 20})
    assert (held_out > 0) == ("valid_fraction" in options)


def test_unfinished_work_is_not_thrown_away_while_a_process_is_at_it(
    tmp_path: Path, tokenizer: Tokenizer, jsonl: Path
) -> None:
    options = dataclasses.replace(CUT, part=Part(1, 2))
    preprocess([jsonl], tmp_path / "s", tokenizer=tokenizer, options=options)
    before = sorted((tmp_path / "s.work/units").iterdir())
    with (
        WorkFolder(tmp_path / "s.work").locked("1-of-2"),
        pytest.raises(DataError, match="another process is working on the job or a part of it"),
    ):
        made([jsonl], tmp_path, tokenizer, overwrite=True, deduplicate=True)
    assert sorted((tmp_path / "s.work/units").iterdir()) == before


@pytest.mark.parametrize(("end", "keep"), [("unit", 20), ("unit", 0), ("tokens", 100)])
def test_a_unit_that_the_machines_fall_has_cut_is_made_again(
    tmp_path: Path,
    tokenizer: Tokenizer,
    jsonl: Path,
    whole: dict[str, bytes],
    end: str,
    keep: int,
) -> None:
    options = dataclasses.replace(CUT, part=Part(1, 2))
    preprocess([jsonl], tmp_path / "s", tokenizer=tokenizer, options=options)
    cut = sorted((tmp_path / "s.work/units").glob(f"*.{end}"))[1]
    cut.write_bytes(cut.read_bytes()[:keep])
    assert made([jsonl], tmp_path, tokenizer) == whole


def test_an_input_that_changes_meanwhile_is_noticed(
    tmp_path: Path, tokenizer: Tokenizer, jsonl: Path
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl.read_bytes())
    lines = jsonl.read_bytes().splitlines(keepends=True)

    def change(progress: Progress) -> None:
        if progress.units == 3:
            path.write_bytes(b"".join(lines[: len(lines) // 2]))

    with pytest.raises(DataError, match=r"a\.jsonl has changed"):
        preprocess([path], tmp_path / "s", tokenizer=tokenizer, options=CUT, progress=change)
    assert not list(tmp_path.glob("s_*"))


def test_existing_shards_are_kept_without_overwrite(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["x"])
    (tmp_path / "s.idx").touch()
    options = PreprocessOptions(valid_fraction=0.0)
    with pytest.raises(DataError, match=r"output exists: .*s\.idx; pass --overwrite"):
        preprocess([path], tmp_path / "s", tokenizer=tokenizer, options=options)


def test_a_failed_run_keeps_the_shards_it_would_have_replaced(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    good = write_jsonl(tmp_path / "a.jsonl", ["good"])
    preprocess([good], tmp_path / "out/s", tokenizer=tokenizer, options=ONE_SHARD)
    before = contents(tmp_path / "out")
    (tmp_path / "b.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match="invalid UTF-8"):
        preprocess([tmp_path / "b.txt"], tmp_path / "out/s", tokenizer=tokenizer, options=ONE_SHARD)
    assert contents(tmp_path / "out") == before


def test_unfinished_work_of_another_job_is_not_mixed_in(
    tmp_path: Path, tokenizer: Tokenizer, jsonl: Path, whole: dict[str, bytes]
) -> None:
    options = dataclasses.replace(CUT, part=Part(1, 2), deduplicate=True)
    preprocess([jsonl], tmp_path / "s", tokenizer=tokenizer, options=options)
    with pytest.raises(DataError, match="another job: --deduplicate then, no --deduplicate now"):
        made([jsonl], tmp_path, tokenizer)
    assert made([jsonl], tmp_path, tokenizer, overwrite=True) == whole


def test_copies_are_left_out_on_request(
    tmp_path: Path, tokenizer: Tokenizer, upstream: ModuleType
) -> None:
    texts = [f"text {number}" for number in range(40)]
    shuffled = random.Random(1).choices(texts, k=200)
    path = write_jsonl(tmp_path / "a.jsonl", shuffled)
    options = PreprocessOptions(valid_fraction=0.0, deduplicate=True, unit_bytes=300)
    manifest = preprocess([path], tmp_path / "s", tokenizer=tokenizer, options=options)
    assert isinstance(manifest, JobManifest)
    decoded = [tokenizer.decode(ids) for ids in megatron_documents(upstream, tmp_path / "s")]
    assert decoded == list(dict.fromkeys(shuffled))
    assert manifest.duplicate_documents == 200 - len(decoded)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "--workers is 0"),
        ({"valid_fraction": 1.0}, "--valid-fraction is 1"),
        ({"test_fraction": -0.1}, "--test-fraction is -0.1"),
        ({"valid_fraction": 0.5, "test_fraction": 0.5}, "leave nothing to train on"),
        ({"shard_tokens": 0}, "--shard-tokens is 0"),
        ({"max_document_bytes": 0}, "--max-document-bytes is 0"),
    ],
)
def test_options_outside_their_range_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(DataError, match=message):
        PreprocessOptions(**options)
