"""What has a name is replaced by a whole, approved output of ours, and by nothing else."""

from __future__ import annotations

import fcntl
import os
import platform
import shutil
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_mup.convert import published_folder
from megatron_mup.convert.formats import HfFormat
from megatron_mup.convert.huggingface_source import HuggingFaceSource
from megatron_mup.convert.huggingface_target import HfExport, write_huggingface
from megatron_mup.convert.published_folder import is_rejected
from megatron_mup.errors import CheckpointError
from tests.convert.memory_weights import random_weights, small_model


def export(folder: Path, seed: int = 0, **options: Any) -> HfExport:
    source = random_weights(small_model(), seed=seed)
    return write_huggingface(source, folder, hf_format=HfFormat.GRANITE, **options)


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def in_killed_child(work: Callable[[], object]) -> None:
    """Run something that kills its process, in a child."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def somebody_elses(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_appeared_during_the_work_is_kept(tmp_path: Path, overwrite: bool) -> None:
    out = tmp_path / "out"
    if overwrite:
        export(out)
    message = "is not the output of an earlier conversion" if overwrite else "exists; pass"
    with pytest.raises(CheckpointError, match=message):
        export(out, overwrite=overwrite, extra_files=lambda _: somebody_elses(out))
    assert names(out) == ["thesis.tex"]
    assert names(tmp_path) == ["out"]


def test_what_appears_after_the_last_look_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(published_folder.Target, "check", lambda _: None)
    with pytest.raises(CheckpointError, match=r"cannot write .*was not made"):
        export(tmp_path / "out", extra_files=lambda _: somebody_elses(tmp_path / "out"))
    assert names(tmp_path / "out") == ["thesis.tex"]


def test_an_output_gets_its_name_back_when_its_replacement_was_killed(tmp_path: Path) -> None:
    out, real = tmp_path / "out", os.rename
    export(out)
    before = weights(out)

    def rename_and_die(old: Path, new: Path) -> None:
        real(old, new)
        kill()

    def work() -> None:
        published_folder.os.rename = rename_and_die  # type: ignore[assignment]
        export(out, seed=1, overwrite=True)

    in_killed_child(work)
    assert not out.exists()
    with pytest.raises(CheckpointError, match="exists; pass --overwrite"):
        export(out, seed=1)
    assert weights(out) == before
    export(out, seed=1, overwrite=True)
    assert weights(out) != before
    assert names(tmp_path) == ["out"]


def test_an_old_output_that_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(out)
    before = weights(out)

    def work() -> None:
        published_folder._remove = lambda _: kill()
        export(out, seed=1, overwrite=True)

    in_killed_child(work)
    assert len(names(tmp_path)) == 2
    after = weights(out)
    assert after != before
    with pytest.raises(CheckpointError, match="exists; pass --overwrite"):
        export(out)
    assert weights(out) == after
    assert names(tmp_path) == ["out"]


def test_what_somebody_still_writes_is_not_taken_for_abandoned(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # The process number is that of no process here, as one of another container would be.
    live = tmp_path / f".out[1].{platform.node()}.99999999.0123abcd.tmp"
    live.mkdir()
    descriptor = os.open(live, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    export(tmp_path / "out[1]")
    assert live.exists()
    assert caplog.text == ""
    os.close(descriptor)
    export(tmp_path / "out[1]", overwrite=True)
    assert names(tmp_path) == ["out[1]"]
    assert f"removed {live}, which a killed process had left" in caplog.text


def test_what_a_process_of_another_machine_left_is_told_and_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = tmp_path / ".out.node17.99999999.0123abcd.tmp"
    other.mkdir()
    longer = tmp_path / f".out.second.{platform.node()}.99999999.0123abcd.tmp"
    longer.mkdir()
    export(tmp_path / "out")
    assert names(tmp_path) == sorted([other.name, longer.name, "out"])
    assert f"{other} is of a process of the machine node17; remove it" in caplog.text
    assert len(caplog.records) == 1


def test_an_output_is_locked_while_it_is_written(tmp_path: Path) -> None:
    def nested(_: Path) -> None:
        export(tmp_path / "out", seed=1)
        shutil.rmtree(tmp_path / "out")

    export(tmp_path / "out", extra_files=nested)
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_without_locks_an_output_is_written_and_nothing_taken_for_abandoned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError("no locks here")

    monkeypatch.setattr(published_folder.fcntl, "flock", unsupported)
    other = f".out.{platform.node()}.99999999.0123abcd.tmp"
    (tmp_path / other).mkdir()
    export(tmp_path / "out")
    assert names(tmp_path) == [other, "out"]


def test_the_approval_sees_everything_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Path] = []
    synced: set[str] = set()
    real = os.fsync

    def sync(descriptor: int) -> None:
        synced.add(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        real(descriptor)

    def approve(folder: Path) -> bool:
        assert not (tmp_path / "out").exists()
        assert {*names(folder), folder.name} <= synced
        HuggingFaceSource(folder).read("output_layer.weight")
        (folder / "report.json").write_text("{}")
        seen.append(folder)
        return True

    monkeypatch.setattr(os, "fsync", sync)
    made = export(tmp_path / "out", approve=approve)
    assert made.folder == tmp_path / "out"
    assert not is_rejected(made.folder)
    assert "report.json" in names(made.folder)
    assert "report.json" in synced
    assert names(tmp_path) == ["out"]
    assert seen[0].name.startswith(".out.")


def test_what_is_not_approved_gets_another_name_and_the_earlier_output_stays(
    tmp_path: Path,
) -> None:
    export(tmp_path / "out")
    before = weights(tmp_path / "out")
    for number, name in enumerate(("out.rejected", "out.rejected.2", "out.rejected.3")):
        made = export(tmp_path / "out", 1 + number, overwrite=True, approve=lambda _: False)
        assert made.folder == tmp_path / name
        assert is_rejected(made.folder)
        assert weights(made.folder) != before
    assert weights(tmp_path / "out") == before
    assert names(tmp_path) == ["out", "out.rejected", "out.rejected.2", "out.rejected.3"]
    assert not is_rejected(tmp_path / "out.rejected.txt")


@pytest.mark.parametrize("error", [CheckpointError("no text"), KeyboardInterrupt(), OSError("io")])
def test_an_approval_that_fails_leaves_the_earlier_output_alone(
    tmp_path: Path, error: BaseException
) -> None:
    export(tmp_path / "out")
    before = weights(tmp_path / "out")

    def approve(_: Path) -> bool:
        raise error

    expected = CheckpointError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected):
        export(tmp_path / "out", 1, overwrite=True, approve=approve)
    assert weights(tmp_path / "out") == before
    assert names(tmp_path) == ["out"]


def test_a_process_killed_during_its_approval_leaves_the_earlier_output_alone(
    tmp_path: Path,
) -> None:
    export(tmp_path / "out")
    before = weights(tmp_path / "out")
    in_killed_child(lambda: export(tmp_path / "out", 1, overwrite=True, approve=lambda _: kill()))
    assert weights(tmp_path / "out") == before
    assert [name for name in names(tmp_path) if not name.startswith(".")] == ["out"]


@pytest.mark.parametrize(
    ("place", "relation"),
    [
        ("out", r"out is the folder that is read \(.*out\); pass a folder beside it"),
        ("link", r"link is the folder that is read \(.*out\); pass a folder beside it"),
        ("out/more", r"out/more lies inside .*out, which is read; pass a folder beside it"),
        (".", r"out, which is read, lies inside .*; pass a folder beside it"),
    ],
)
def test_the_folder_that_is_read_is_never_written(
    tmp_path: Path, place: str, relation: str
) -> None:
    export(tmp_path / "out")
    (tmp_path / "link").symlink_to("out")
    before = weights(tmp_path / "out")
    source = HuggingFaceSource(tmp_path / "out")
    with pytest.raises(CheckpointError, match=relation):
        write_huggingface(source, tmp_path / place, hf_format=HfFormat.LLAMA, overwrite=True)
    assert weights(tmp_path / "out") == before
    assert names(tmp_path) == ["link", "out"]


def test_a_model_that_was_not_converted_is_never_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(out)
    card = (out / "README.md").read_text()
    for text in (None, "", "---\nlicense: mit\n---\n- megatron_mup\n", "- megatron_mup\n"):
        (out / "README.md").unlink(missing_ok=True)
        if text is not None:
            (out / "README.md").write_text(text)
        with pytest.raises(CheckpointError, match="is not the output of an earlier conversion"):
            export(out, overwrite=True)
    # Its author's additions do not make it somebody else's.
    (out / "README.md").write_text(card.replace("---\n", "---\nlicense: mit\n", 1) + "More.\n")
    export(out, overwrite=True)
    assert (out / "README.md").read_text() == card


def test_a_link_is_replaced_and_not_what_it_names(tmp_path: Path) -> None:
    export(tmp_path / "real")
    before = weights(tmp_path / "real")
    (tmp_path / "out").symlink_to("real")
    export(tmp_path / "out", 1, overwrite=True)
    assert weights(tmp_path / "real") == before
    assert weights(tmp_path / "out") != before
    assert names(tmp_path) == ["out", "real"]
