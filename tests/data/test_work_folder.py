from __future__ import annotations

from pathlib import Path

import pytest

from megatron_mup.data.work_folder import WorkFolder
from megatron_mup.errors import DataError

PLAN = {
    "options": {"json_key": "text", "valid_fraction": 0.1},
    "inputs": [{"name": "a.jsonl", "bytes": 10, "fingerprint": "f"}],
}


@pytest.fixture
def work(tmp_path: Path) -> WorkFolder:
    folder = WorkFolder(tmp_path / "s.work")
    folder.open(PLAN)
    return folder


def test_the_same_job_may_go_on(work: WorkFolder) -> None:
    work.open(PLAN)
    assert work.units.is_dir()


@pytest.mark.parametrize(
    ("changed", "difference"),
    [
        (
            {"options": {"json_key": "content", "valid_fraction": 0.1}},
            "--json-key text then, --json-key content now",
        ),
        ({"inputs": []}, "--input a.jsonl is not there now"),
        (
            {"inputs": [{"name": "a.jsonl", "bytes": 11, "fingerprint": "g"}]},
            r"the input a.jsonl has changed \(10 bytes then, 11 now\)",
        ),
    ],
)
def test_another_job_is_refused_with_what_differs(
    work: WorkFolder, changed: dict[str, object], difference: str
) -> None:
    with pytest.raises(DataError, match=f"another job: {difference}.*--overwrite"):
        work.open({**PLAN, **changed})


def test_a_damaged_plan_is_refused(work: WorkFolder) -> None:
    (work.path / "plan.json").write_text('{"options"')
    with pytest.raises(DataError, match=r"plan\.json is damaged"):
        work.open(PLAN)


def test_two_processes_never_hold_the_same(work: WorkFolder) -> None:
    with work.locked("1-of-2"):
        with work.locked("2-of-2"):
            pass
        with pytest.raises(DataError, match="working on part 1-of-2"), work.locked("1-of-2"):
            pass
        with pytest.raises(DataError, match="working on the job or a part"), work.locked(None):
            pass
    with work.locked(None), pytest.raises(DataError, match="working on the whole job"):
        work.locked("1-of-2").__enter__()
    with work.locked(None):
        pass


def test_a_rejected_engine_is_remembered(work: WorkFolder) -> None:
    assert work.rejected_engine() is None
    work.reject_engine("gigatoken", "a.jsonl, document at 3")
    assert work.rejected_engine() == "gigatoken"


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot make the work folder .*--output-prefix"):
        WorkFolder(tmp_path / "file" / "s.work").open(PLAN)
