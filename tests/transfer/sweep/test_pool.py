"""Who gets which cores and GPUs."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_mup.errors import ConfigError
from megatron_mup.transfer.sweep.pool import Share, divide_machine, gpus_of_machine


def divided(**changes: Any) -> Share:
    given = {"workers": None, "threads": None, "gpu_share": 1, "cores": 8, "gpus": ()}
    return divide_machine(**given | changes)


def test_without_a_gpu_each_core_is_a_worker() -> None:
    assert divided() == Share(workers=8, threads=1)
    assert divided(workers=3).threads == 2
    assert divided(workers=16).threads == 1
    assert divided(workers=2, threads=1).threads == 1
    assert divided(workers=2).environment(1) == {"OMP_NUM_THREADS": "4"}


def test_gpus_are_shared_by_as_many_workers_as_asked_for() -> None:
    share = divided(gpus=("0", "5"), gpu_share=3)
    assert (share.workers, share.threads) == (6, 1)
    assert [share.environment(slot)["CUDA_VISIBLE_DEVICES"] for slot in range(6)] == list("000555")
    assert divided(gpus=("0", "5")).workers == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"workers": 0}, "--workers is 0; give at least 1"),
        ({"threads": 0}, "--threads is 0"),
        ({"gpu_share": 0}, "--gpu-share is 0"),
        (
            {"workers": 3, "gpus": ("0",), "gpu_share": 2},
            r"--workers 3 is more than 1 GPU\(s\) x --gpu-share 2 = 2",
        ),
    ],
)
def test_shares_that_do_not_work_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        divided(**changes)


def test_visible_devices_limit_the_gpus() -> None:
    assert gpus_of_machine({"CUDA_VISIBLE_DEVICES": "3,GPU-abc"}) == ["3", "GPU-abc"]
    assert gpus_of_machine({"CUDA_VISIBLE_DEVICES": ""}) == []
    assert gpus_of_machine({"CUDA_VISIBLE_DEVICES": "-1"}) == []
