"""What one machine says of itself before training."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from megatron_mup import platform
from megatron_mup.launching.machine_checks import (
    check_device,
    check_machine,
    checkpoints_gb,
    data_digest,
    processes_on_node,
)
from megatron_mup.training.ranks import Launch
from tests.configurations import tiny
from tests.data.written_shards import write_shard

Usage = namedtuple("Usage", "total used free")


def test_a_healthy_machine_has_versions_data_and_no_failures(tmp_path: Path) -> None:
    prefix = write_shard(tmp_path / "shard", [[3, 4, 5, 2]])
    run = tiny(f"train_data_path=[{prefix}]", f"checkpoint.save={tmp_path}/c")
    found = check_machine(run, free_gb=0.001, environment={})
    assert found.failures == {}
    assert torch.__version__.startswith(found.versions["torch"])
    assert {"python", "megatron_mup", "megatron-core"} <= set(found.versions)
    assert found.data is not None
    assert len(found.data) == 64
    assert list((tmp_path / "c").iterdir()) == []


def test_a_full_disk_is_told_in_numbers(tmp_path: Path) -> None:
    run = tiny(f"checkpoint.save={tmp_path}/c")
    with patch.object(shutil, "disk_usage", lambda _path: Usage(0, 0, 3_500_000_000)):
        found = check_machine(run, free_gb=4.0, environment={})
        assert found.failures == {"checkpoint disk": f"3.5 GB free in {tmp_path}/c, 4.0 GB needed"}
        assert check_machine(run, free_gb=3.4, environment={}).failures == {}
    with patch.object(shutil, "disk_usage", lambda _path: Usage(0, 0, 900_000_000)):
        failures = check_machine(run, free_gb=0.0, environment={}).failures
        assert failures["temporary folder"].startswith("900.0 MB free in ")
        assert failures["temporary folder"].endswith(", 1.0 GB needed")
    with patch.object(shutil, "disk_usage", lambda _path: Usage(0, 0, 4_100_000)):
        found = check_machine(run, free_gb=0.0056, environment={})
        assert found.failures["checkpoint disk"] == f"4.1 MB free in {tmp_path}/c, 5.6 MB needed"


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = check_machine(tiny(f"checkpoint.save={tmp_path}/file/c"), free_gb=0.0, environment={})
    assert "Not a directory" in found.failures["checkpoint disk"]


def test_the_space_that_is_asked_for_holds_two_checkpoints() -> None:
    # Width 64, FFN 256, 2 layers, 96 padded words: matrices 2 (4 64^2 + 2 64 256), embedding and
    # readout 2 96 64; fp32 weights and two moments, 12 bytes each; twice.
    elements = 2 * (4 * 64**2 + 2 * 64 * 256) + 2 * 96 * 64
    assert checkpoints_gb(tiny()) == pytest.approx(2 * 12 * elements / 1e9)


def test_data_that_is_missing_or_other_data_is_told(tmp_path: Path) -> None:
    found = check_machine(tiny("train_data_path=[/nowhere/shard]"), free_gb=0.0, environment={})
    assert "/nowhere/shard" in found.failures["data"]
    first = write_shard(tmp_path / "a", [[3, 4, 5, 2]])
    same = write_shard(tmp_path / "b", [[3, 4, 5, 2]])
    longer = write_shard(tmp_path / "c", [[3, 4, 5, 6, 2]])
    digests = [data_digest(tiny(f"train_data_path=[{prefix}]")) for prefix in (first, same, longer)]
    assert digests[0] == digests[1] != digests[2]
    assert data_digest(tiny()) is None


@pytest.mark.parametrize(
    ("environment", "processes"),
    [
        ({"LOCAL_WORLD_SIZE": "8"}, 8),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x16)"}, 8),
        ({"SLURM_STEP_TASKS_PER_NODE": "4"}, 4),
        ({"SLURM_STEP_TASKS_PER_NODE": "4,3"}, None),
        ({}, None),
    ],
)
def test_the_processes_of_a_node_are_known(
    environment: dict[str, str], processes: int | None
) -> None:
    assert processes_on_node(environment) == processes


@pytest.mark.parametrize(
    ("visible", "environment", "failure"),
    [
        (8, {"LOCAL_WORLD_SIZE": "8"}, None),
        (7, {"LOCAL_WORLD_SIZE": "8"}, "7 visible for 8 processes"),
        # The scheduler gave each process its own.
        (1, {"LOCAL_WORLD_SIZE": "8"}, None),
        (8, {}, None),
        (0, {}, None),
        (0, {"SLURM_GPUS_ON_NODE": "8"}, "torch sees no GPU, but the job has some"),
    ],
)
def test_gpus_that_are_missing_are_told(
    visible: int, environment: dict[str, str], failure: str | None
) -> None:
    with (
        patch.object(platform, "has_cuda", lambda: visible > 0),
        patch.object(torch.cuda, "device_count", lambda: visible),
        patch.object(torch.cuda, "get_device_name", lambda: "GPU"),
    ):
        failures = check_machine(tiny(), free_gb=0.0, environment=environment).failures
    assert failures.get("GPUs") == failure


def test_a_machine_without_gpu_has_no_device_to_check() -> None:
    if platform.has_cuda():
        assert check_device(Launch()).failure is None
    else:
        assert check_device(Launch()).name is None
