"""``launch/mup_10b.sh`` on sixteen live nodes; training and preflight are acted on 128 ranks."""

from __future__ import annotations

import re

import pytest

from megatron_mup.config_io import load_config
from megatron_mup.training.processes import Launch, detect_launch
from tests.slurm.site import Site, write_shards

pytestmark = pytest.mark.slurm

RANKS_PER_NODE, RANKS = 8, 128
EVERYWHERE = {
    "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7",
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    "OMP_NUM_THREADS": "12",
    # What the step has: twelve for each of its eight ranks.
    "SLURM_CPUS_ON_NODE": "96",
    "SLURM_STEP_NUM_NODES": "16",
    "MEGATRON_MUP_ATTEMPT": "1",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
    # Fifteen minutes, as parallel.distributed_timeout_minutes of the configuration.
    "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "900",
}
"""Variables that all ranks have alike."""
STEPS = ("train_iters=3", "schedule.lr_warmup_iters=1")


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> tuple[str, ...]:
    return write_shards(tmp_path_factory.mktemp("data"))


@pytest.fixture
def site(wide_cluster, tmp_path) -> Site:
    return Site(wide_cluster, tmp_path, acted=("train", "launch preflight"))


def test_the_whole_path_runs_with_the_right_variables_on_128_ranks(site, shards):
    options = (*shards, *STEPS)
    site.prepare_record("mup_10b.yaml", *options, "lr=0.25")
    tuned = site.folder / "tuned.yaml"
    tuned.write_text(
        "lr: 0.25\nparameterization: {name: mup, base_hidden_size: 128, base_ffn_hidden_size: 512, "
        "base_kv_channels: 128, base_num_layers: 12, q_init: zero}\n"
    )
    site.trouble("export STUB_CHECKS=yes\n")

    job = site.submit("mup_10b.sh", *options, LR_FROM=str(tuned))
    ended = site.end(job)

    log = site.log("mup_10b", job)
    assert (ended.state, ended.restarts) == ("COMPLETED", 0), log
    for command, port in (("launch preflight", 1), ("train", 0)):
        ranks = site.environments(f"{job}.0", command)
        assert sorted(ranks) == list(range(RANKS))
        for rank, variables in ranks.items():
            node, local_rank = divmod(rank, RANKS_PER_NODE)
            place = Launch(
                rank=rank,
                world_size=RANKS,
                local_rank=local_rank,
                address="127.0.0.1",
                port=10_000 + 2 * (job % 10_000) + port,
            )
            assert detect_launch(variables) == place
            expected = EVERYWHERE | {"SLURMD_NODENAME": f"n{node + 1}"}
            assert {name: variables.get(name) for name in expected} == expected
    # Tuned under the relative rule: 128 times too much for the absolute one.
    assert re.search(r"ffn_in +128\n", log), log
    assert load_config(site.work / "runs/mup_10b/launch/config.yaml").optimizer.lr == 0.25


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        ((), {"LR": "0.25", "EXCLUDE_AFTER": "0"}, "EXCLUDE_AFTER is 0"),
        (("optimizer.lion_beta3=0.9",), {"LR": "0.25"}, "lion_beta3"),
        (("tensor_model_parallel_size=3",), {"LR": "0.25"}, "tensor_model_parallel_size"),
        ((), {}, "no peak learning rate"),
    ],
)
def test_a_mistake_ends_the_job_before_any_rank_starts(
    site, shards, arguments, environment, message
):
    job = site.submit("mup_10b.sh", *shards, *arguments, **environment)

    ended = site.end(job)

    log = site.log("mup_10b", job)
    assert (ended.state, ended.exit_code, ended.restarts) == ("FAILED", 2, 0), log
    assert log.startswith("error: ")
    assert message in log
    assert {call.command for call in site.calls()} <= {"launch begin"}


def test_the_stand_in_for_training_refuses_a_layout_that_does_not_fit(site, shards):
    # Changed after "begin" has found it good, so that the stand-in alone is there to refuse it.
    site.trouble(
        "export STUB_CHECKS=yes\n"
        "[[ $command$rank != train0 ]] || sed -i 's/^\\( *tensor_model.*\\) 2$/\\1 3/' \"$3\"\n"
    )

    job = site.submit("mup_10b.sh", *shards, *STEPS, LR="0.25", PREFLIGHT_SECONDS="0")
    ended = site.end(job)

    log = site.log("mup_10b", job)
    assert (ended.state, ended.exit_code, ended.restarts) == ("FAILED", 2, 0), log
    assert "tensor_model_parallel_size" in log
    assert {call.command for call in site.calls()} >= {"launch begin", "train", "launch decide"}
    # No iteration was acted.
    assert not (site.work / "runs/mup_10b/metrics.jsonl").exists()
