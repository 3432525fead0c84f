"""A damaged checkpoint is named and the one before is used."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_mup.checkpoint.folders import RECORD, TRACKER, read_record
from megatron_mup.checkpoint.integrity import CHECKSUMS
from megatron_mup.errors import CheckpointError
from tests.checkpoint.short_runs import folders, losses, run_training
from tests.configurations import tiny

OPTIONS = ["lr_decay_iters=6", "save_interval=2"]
Damage = Callable[[Path], None]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints at 2 and 4."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    run_training(tiny(*OPTIONS, "train_iters=4", *folders(folder)))
    return folder


@pytest.fixture(scope="module")
def whole_losses() -> list[float]:
    """Losses of the uninterrupted run."""
    return losses(run_training(tiny(*OPTIONS[:1], "train_iters=6")))


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "run"))


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES: dict[str, tuple[str, Damage, str]] = {
    "cut": ("__0_0.distcp", cut, "__0_0.distcp has "),
    "missing": ("__0_0.distcp", Path.unlink, "__0_0.distcp is missing"),
    "flipped": ("__0_0.distcp", flip_a_bit, "__0_0.distcp was changed"),
    "flipped metadata": (".metadata", flip_a_bit, ".metadata was changed"),
    "flipped record": (RECORD, flip_a_bit, f"{RECORD} was changed"),
    "no checksums": (CHECKSUMS, Path.unlink, f"{TRACKER} names '4', but iteration 2 is used"),
    "cut checksums": (CHECKSUMS, cut, f"{CHECKSUMS} is damaged"),
}


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    damage: str, copy: Path, whole_losses: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    name, spoil, words = DAMAGES[damage]
    spoil(copy / "iter_0000004" / name)
    result = run_training(tiny(*OPTIONS, "train_iters=6", *folders(copy, load=True)))
    assert losses(result) == whole_losses[2:]
    assert words in caplog.text
    # The damaged one was replaced on the way.
    (copy / TRACKER).unlink()
    shutil.rmtree(copy / "iter_0000006")
    result = run_training(tiny(*OPTIONS, "train_iters=6", *folders(copy, load=True)))
    assert losses(result) == whole_losses[4:]


def test_all_damaged_is_an_error_that_names_every_file(copy: Path) -> None:
    for iteration in (2, 4):
        flip_a_bit(copy / f"iter_{iteration:07d}" / "__0_0.distcp")
    with pytest.raises(CheckpointError) as error:
        run_training(tiny(*OPTIONS, "train_iters=6", *folders(copy, load=True)))
    for words in ("iter_0000002/__0_0.distcp was", "iter_0000004/__0_0.distcp was", "from a copy"):
        assert words in str(error.value)


def test_a_step_that_was_asked_for_is_used_or_refused_but_not_replaced(
    copy: Path, whole_losses: list[float]
) -> None:
    asked = [OPTIONS[0], "train_iters=4", f"load={copy}"]
    assert losses(run_training(tiny(*asked, "ckpt_step=2"))) == whole_losses[2:4]
    with pytest.raises(CheckpointError, match=r"no whole iteration 3, but \[4, 2\]; choose"):
        run_training(tiny(*asked, "ckpt_step=3"))
    flip_a_bit(copy / "iter_0000004" / "__0_0.distcp")
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp was changed"):
        run_training(tiny(*asked, "ckpt_step=4"))


def test_a_checkpoint_from_before_checksums_is_used_with_a_warning(
    copy: Path, whole_losses: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    folder = copy / "iter_0000004"
    record = read_record(folder)
    (folder / CHECKSUMS).unlink()
    old = {key: record[key] for key in record if key not in ("provenance", "history")}
    del old["config"]["optimizer"]["adam_beta2"]
    (folder / RECORD).write_text(json.dumps({**old, "format": 1}))
    result = run_training(tiny(OPTIONS[0], "train_iters=6", f"load={copy}"))
    assert losses(result) == whole_losses[4:]
    assert "its files are used unchecked" in caplog.text
