"""The coordinate check over ranks: the same numbers in every layout, one refusal for all."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_mup.diagnostics.coordinate_report import read_coordinates
from megatron_mup.diagnostics.coordinates import Coordinate
from megatron_mup.training.processes import Launch
from tests.diagnostics.coordinate_worker import measured
from tests.distributed.spawn import run_ranks

pytestmark = pytest.mark.dist

LAYOUTS = {
    "TP2": ["tensor_model_parallel_size=2"],
    "TP2 sequence": ["tensor_model_parallel_size=2", "sequence_parallel=true"],
    "PP2": ["pipeline_model_parallel_size=2"],
    "DP2 sharded": ["use_distributed_optimizer=true"],
}


def sizes(rows: list[Coordinate]) -> dict[tuple[int, int, str], tuple[float, float]]:
    return {(row.width, row.step, row.module): (row.rms, row.change) for row in rows}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks wrote."""
    output = tmp_path_factory.mktemp("coordinates")
    job = {"world_size": 2, "layouts": LAYOUTS}
    # A rank that goes on alone would wait for the others.
    run_ranks("tests.diagnostics.coordinate_worker", job, output, timeout=120)
    return output


def test_every_layout_measures_what_one_rank_measures(folder: Path) -> None:
    expected = sizes(measured([], Launch()))
    assert len(expected) == 2 * 3 * 11
    for name in LAYOUTS:
        for rank in (0, 1):
            rows = read_coordinates((folder / f"{name} {rank}.csv").read_text(encoding="utf-8"))
            assert set(sizes(rows)) == set(expected)
            for key, pair in sizes(rows).items():
                assert pair == pytest.approx(expected[key], rel=2e-3, abs=1e-7), (name, key)


def test_a_folder_that_the_first_rank_cannot_write_to_is_refused_on_every_rank(
    folder: Path,
) -> None:
    first, second = ((folder / f"refusal {rank}").read_text() for rank in (0, 1))
    assert first.startswith(f"cannot write to the folder {folder / 'job.json' / 'out'} of --out")
    assert second == first
    assert not (folder / "elsewhere").exists()
