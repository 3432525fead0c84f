"""Tables of other programs: which of their lines are runs, and what is said of the others."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_mup.errors import DataError
from megatron_mup.transfer.foreign_rows import ForeignTable, read_foreign

_WANDB = (
    '"Name","n_embd","learning_rate","val/loss","_runtime"\n'
    '"calm","256","0.0009765625","3.125","12.5"\n'
    '"wild","256","0.5","NaN","2"\n'
    '"lost","512","1e-3","Infinity","2"\n'
)
_COLUMNS = {"width": "n_embd", "lr": "learning_rate", "loss": "val/loss"}
_MAPPING = {"width": "width", "log2_lr": "log2", "loss": "loss"}


def table(tmp_path: Path, *lines: str, seeds: bool = False) -> ForeignTable:
    """A table of width, log2, loss and seconds, with a column of seeds where they are mapped."""
    path = tmp_path / "t.csv"
    path.write_text("\n".join(["width,log2,loss,seed,seconds", *lines]) + "\n")
    mapping = _MAPPING | {"seconds": "seconds"} | ({"seed": "seed"} if seeds else {})
    return read_foreign(path, mapping)


def test_an_export_of_wandb_is_read_with_a_mapping(tmp_path: Path) -> None:
    path = tmp_path / "export.csv"
    path.write_text(_WANDB, encoding="utf-8-sig")
    found = read_foreign(path, _COLUMNS | {"arm": "Name", "seconds": "_runtime"})
    rows = found.rows
    assert [(row.axis, row.size, row.arm, row.seed) for row in rows] == [
        ("width", 256.0, "calm", 1),
        ("width", 256.0, "wild", 1),
        ("width", 512.0, "lost", 1),
    ]
    assert (rows[0].log2_lr, rows[0].validation_loss, rows[0].seconds) == (-10.0, 3.125, 12.5)
    assert [row.status.value for row in rows] == ["finished", "diverged", "diverged"]
    assert len({row.cell for row in rows}) == 3
    assert (found.notes, found.seeds_known) == ((), False)


@pytest.mark.parametrize("text", ["nan", "NaN", "NAN", "inf", "-Infinity", " INF "])
def test_a_loss_that_is_not_finite_is_a_diverged_run(tmp_path: Path, text: str) -> None:
    found = table(tmp_path, "64,-3,2.5,1,9", f"64,-2,{text},1,9", seeds=True)
    assert [row.status.value for row in found.rows] == ["finished", "diverged"]
    assert found.notes == ()


def test_a_line_without_a_loss_is_no_run_and_is_named(tmp_path: Path) -> None:
    found = table(tmp_path, "64,-3,2.5,1,9", "64,-2,,1,9", "128,-2, ,,", "128,-1,2.4,1,9")
    assert [(row.size, row.log2_lr) for row in found.rows] == [(64.0, -3.0), (128.0, -1.0)]
    assert found.notes == (
        "2 lines of the table have no loss in the column 'loss' and no part in the report: line 3 "
        "(width 64, log2_lr -2), line 4 (width 128, log2_lr -2)",
    )


def test_many_lines_without_a_loss_are_counted(tmp_path: Path) -> None:
    (note,) = table(tmp_path, "64,-3,2.5,1,9", *["64,-2,,1,9"] * 8).notes
    assert note.startswith("8 lines of the table have no loss")
    assert note.endswith("line 8 (width 64, log2_lr -2) and 2 more")


def test_a_column_without_any_loss_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no loss in the column 'loss' on any of its 2 lines"):
        table(tmp_path, "64,-3,,1,9", "64,-2,,1,9")


def test_lines_of_one_seed_with_one_loss_are_one_run(tmp_path: Path) -> None:
    lines = ["64,-3,2.5,1,9", "64,-3,2.5,2,9", "64,-3,2.50,1,8", "64,-2,nan,1,9", "64,-2,inf,1,9"]
    found = table(tmp_path, *lines, seeds=True)
    assert [(row.log2_lr, row.seed) for row in found.rows] == [(-3, 1), (-3, 2), (-2, 1)]
    assert found.seeds_known
    assert found.notes == (
        "2 lines of the table repeat an earlier one in arm, size, learning rate, seed and loss, "
        "and are counted once: line 4 (width 64, log2 LR -3), line 6 (width 64, log2 LR -2)",
    )


@pytest.mark.parametrize(("loss", "shown"), [("2.75", "2.75"), ("nan", "diverged")])
def test_lines_of_one_seed_with_different_losses_are_refused(
    tmp_path: Path, loss: str, shown: str
) -> None:
    words = (
        r"t.csv, lines 2 and 4 are both arm runs, width 64, log2 LR -3, seed 1, with losses 2.5 "
        rf"and {shown}; .*--column seed=NAME or --column arm=NAME"
    )
    with pytest.raises(DataError, match=words):
        table(tmp_path, "64,-3,2.5,1,9", "64,-2,2.5,1,9", f"64,-3,{loss},1,9", seeds=True)


def test_a_run_that_was_lost_and_run_again_is_no_contradiction(tmp_path: Path) -> None:
    found = table(tmp_path, "64,-3,,1,9", "64,-3,2.5,1,9", seeds=True)
    assert [row.validation_loss for row in found.rows] == [2.5]


def test_without_seeds_other_losses_are_repeats_and_equal_ones_are_one_run(tmp_path: Path) -> None:
    found = table(tmp_path, "64,-3,2.5,,9", "64,-3,2.75,,9", "64,-3,2.5,,7", "128,-3,2.5,,9")
    assert [(row.size, row.validation_loss) for row in found.rows] == [
        (64, 2.5),
        (64, 2.75),
        (128, 2.5),
    ]
    assert found.notes == (
        "1 line of the table repeats an earlier one in arm, size, learning rate and loss, and is "
        "counted once: line 4 (width 64, log2 LR -3); if they are runs of other seeds, name their "
        "column with --column seed=NAME",
    )


def test_without_seeds_diverged_runs_stay_apart(tmp_path: Path) -> None:
    found = table(tmp_path, "64,-3,nan,,9", "64,-3,nan,,9")
    assert (len(found.rows), found.notes) == (2, ())
    assert len({row.cell for row in found.rows}) == 2


@pytest.mark.parametrize(
    ("lines", "mapping", "words"),
    [
        (
            ["64,-9,3", "64,-8,3"],
            {"lr": "rate"},
            r"line 2: the learning rate is -9.0; it must be positive; if 'rate' is log2 of "
            r"learning rates, give --column log2_lr=rate",
        ),
        (["64,-1,3", "64,1,3"], {"lr": "rate"}, r"give --column log2_lr=rate"),
        (["64,0,3", "64,1e-3,3"], {"lr": "rate"}, r"learning rate is 0.0; it must be positive$"),
        (
            ["64,0.001,3", "64,0.01,3"],
            {"log2_lr": "rate"},
            r"log2_lr \('rate'\) goes from 0.001 to 0.01, .* give --column lr=rate",
        ),
    ],
)
def test_rates_and_their_logarithms_are_not_mistaken_for_each_other(
    tmp_path: Path, lines: list[str], mapping: dict[str, str], words: str
) -> None:
    path = tmp_path / "t.csv"
    path.write_text("\n".join(["width,rate,loss", *lines]) + "\n")
    with pytest.raises(DataError, match=words):
        read_foreign(path, {"width": "width", "loss": "loss", **mapping})


@pytest.mark.parametrize(
    ("mapping", "words"),
    [
        ({"width": "n_embd", "lr": "rate", "loss": "val/loss"}, r"no column 'rate'; it has Name"),
        (
            {"width": "n_embd", "loss": "val/loss"},
            r"a learning rate must be given once as --column",
        ),
        ({"lr": "learning_rate", "loss": "val/loss"}, r"a size .*given: none"),
        (_COLUMNS | {"depth": "n_embd"}, r"a size .*given: width, depth"),
        (_COLUMNS | {"speed": "n_embd"}, r"--column speed=\.\.\.: 'speed' is not known"),
        (_COLUMNS | {"width": "Name"}, r"line 2: width \('Name'\) is 'calm', no number"),
        (_COLUMNS | {"width": "val/loss"}, r"line 3: width \('val/loss'\) is 'NaN', not finite"),
    ],
)
def test_what_a_foreign_table_lacks_is_named(
    tmp_path: Path, mapping: dict[str, str], words: str
) -> None:
    path = tmp_path / "export.csv"
    path.write_text(_WANDB)
    with pytest.raises(DataError, match=words):
        read_foreign(path, mapping)
    with pytest.raises(DataError, match="cannot read the table"):
        read_foreign(tmp_path / "absent.csv", _COLUMNS)
