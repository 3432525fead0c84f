"""The dry run builds every stage without memory, and reports what a run would be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_mup import cli
from megatron_mup import dry_run as module
from megatron_mup.config import RunConfig
from megatron_mup.dry_run import DryRun, dry_run
from megatron_mup.dry_run_report import cost_lines, file_lines, landmarks, layout_lines, render
from megatron_mup.errors import ConfigError, DataError, ParameterizationError
from tests.configurations import tiny

ROOT = Path(__file__).parents[1]
ELSEWHERE = "data.train_data_path=[elsewhere/train]"


def run_of(*options: str) -> RunConfig:
    return tiny(ELSEWHERE, *options)


def elements(report: DryRun) -> list[list[int]]:
    return [[chunk.elements for chunk in stage.chunks] for stage in report.stages]


def test_stages_of_a_split_model_hold_their_shares() -> None:
    report = dry_run(run_of("tensor_model_parallel_size=2", "pipeline_model_parallel_size=2"))
    # Half of 12 x 64 x 64 matrix elements, and of a 96 x 64 embedding or readout.
    assert elements(report) == [[24576 + 3072], [24576 + 3072]]
    assert [stage.chunks[0].layers for stage in report.stages] == [(0,), (1,)]
    assert [stage.chunks[0].readout for stage in report.stages] == [False, True]
    assert (report.matrix_elements, report.other_elements) == (2 * 49152, 2 * 6144)
    assert (report.world_size, report.data_parallel_size, report.microbatches) == (4, 1, 2)


def test_virtual_chunks_take_turns_over_the_stages() -> None:
    options = ("num_layers=4", "base_num_layers=4", "virtual_pipeline_model_parallel_size=2")
    report = dry_run(run_of("pipeline_model_parallel_size=2", *options))
    layers = [[chunk.layers for chunk in stage.chunks] for stage in report.stages]
    assert layers == [[(0,), (2,)], [(1,), (3,)]]
    assert elements(report) == [[49152 + 6144, 49152], [49152, 49152 + 6144]]


@pytest.mark.parametrize(
    "options",
    [
        ("untie_embeddings_and_output_weights=false", "output_form=multiplier"),
        ("num_query_groups=2", "norm_gain=vector", "activation=swiglu"),
        ("norm_gain=scalar", "add_bias_linear=true"),
    ],
    ids=" ".join,
)
def test_every_kind_of_parameter_is_found_in_the_table(options: tuple[str, ...]) -> None:
    split = ("tensor_model_parallel_size=2", "pipeline_model_parallel_size=2")
    report = dry_run(run_of(*split, "sequence_parallel=true", *options))
    copies = sum(len(stage.chunks) for stage in report.stages)
    assert copies == 2
    whole = dry_run(run_of(*options))
    assert elements(whole) == [[whole.matrix_elements + whole.other_elements]]
    assert whole.other_elements == report.other_elements


def test_a_parameter_that_differs_from_the_table_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A shard that is taken for the whole.
    monkeypatch.setattr(module, "_is_split", lambda parameter: False)
    with pytest.raises(ParameterizationError) as caught:
        dry_run(run_of("tensor_model_parallel_size=2"))
    assert "'decoder.layers.0.mlp.linear_fc1.weight': 8192 elements built" in str(caught.value)
    assert "16384 in the table" in str(caught.value)


def test_no_process_group_outlives_the_dry_run() -> None:
    dry_run(run_of("pipeline_model_parallel_size=2"))
    assert not dist.is_initialized()


@pytest.mark.parametrize("size", [0, -4])
def test_world_size_must_be_positive(size: int) -> None:
    with pytest.raises(ConfigError, match=f"--world-size is {size}"):
        dry_run(run_of(), world_size=size)


def test_a_world_that_the_layout_or_the_batch_does_not_fill_is_refused() -> None:
    with pytest.raises(ConfigError, match="3 process"):
        dry_run(run_of("tensor_model_parallel_size=2"), world_size=3)
    with pytest.raises(ConfigError, match="global_batch_size 4 is not divisible"):
        dry_run(run_of(), world_size=4)


GPU_ONLY = (
    "transformer_impl=transformer_engine",
    "bf16=true",
    "fp8_format=hybrid",
    "context_parallel_size=2",
    "micro_batch_size=4",
    "recompute_granularity=selective",
    "deterministic_mode=true",
)


def test_what_only_a_gpu_can_run_is_built_with_local_modules_and_said() -> None:
    report = dry_run(run_of(*GPU_ONLY))
    assert (report.world_size, report.data_parallel_size) == (2, 1)
    text = render(report)
    assert "transformer_engine was built with local modules" in text
    assert "FP8 hybrid, delayed scaling" in text
    assert "built with local modules" not in render(dry_run(run_of()))


def shard(folder: Path, name: str, *, tokens: int = 40) -> Path:
    prefix = folder / name
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    builder.add_document(torch.arange(tokens) % 90, [tokens])
    builder.finalize(f"{prefix}.idx")
    return prefix


def test_shards_of_this_machine_are_checked_and_others_named(tmp_path: Path) -> None:
    here = shard(tmp_path, "here")
    run = tiny(f"train_data_path=[{here},{tmp_path}/gone]")
    assert dry_run(run).data == (
        f"{here}: whole, fits the model",
        f"{tmp_path}/gone: not on this machine, not checked",
    )
    # 24 sequences of 16 tokens, of a shard of 40.
    state, warning = dry_run(tiny(f"train_data_path=[{here}]")).data
    assert state == f"{here}: whole, fits the model, read 9.60 times"
    assert warning.startswith(f"warning: training repeats its data: '{here}' 9.6 times;")
    here.with_suffix(".bin").write_bytes(b"cut")
    with pytest.raises(DataError, match=r"here\.bin"):
        dry_run(run)


def test_a_set_and_a_blend_file_are_checked_as_one(tmp_path: Path) -> None:
    for number in range(2):
        shard(tmp_path, f"set-0000{number}-of-00002", tokens=400)
    file = tmp_path / "blend.json"
    file.write_text(json.dumps({"train": ["1", f"{tmp_path}/set", "1", f"{tmp_path}/gone"]}))
    assert dry_run(tiny(f"per_split_data_args_path={file}")).data == (
        f"{tmp_path}/set: whole, fits the model",
        f"{tmp_path}/gone: not on this machine, not checked",
    )
    # 24 sequences of 16 tokens, of 800.
    line = f"{tmp_path}/set: whole, fits the model, read 0.48 times"
    assert dry_run(tiny(f"train_data_path=[{tmp_path}/set]")).data == (line,)
    (tmp_path / "set-00001-of-00002.idx").unlink()
    with pytest.raises(DataError, match="has 1 of 2 shards"):
        dry_run(tiny(f"train_data_path=[{tmp_path}/set]"))


def test_a_bad_held_out_shard_is_refused_and_missing_data_named(tmp_path: Path) -> None:
    short = shard(tmp_path, "short", tokens=10)
    run = run_of(f"valid_data_path=[{short}]", "eval_iters=1")
    with pytest.raises(DataError, match="short' has 10 tokens"):
        dry_run(run)
    with pytest.raises(DataError, match=r"data\.train_data_path is empty"):
        dry_run(tiny())
    with pytest.raises(DataError, match=r"data\.valid_data_path is empty"):
        dry_run(run_of("eval_iters=1"))


def test_landmarks_follow_the_schedule() -> None:
    assert landmarks(run_of("lr_warmup_iters=2")) == [
        ("start", 0),
        ("end of warmup", 2),
        ("middle", 3),
        ("last step", 5),
        ("end", 6),
    ]
    wsd = run_of("train_iters=100", "lr_decay_style=WSD", "lr_wsd_decay_iters=20")
    assert ("start of decay", 80) in landmarks(wsd)
    longer = run_of("lr_decay_iters=100", "lr_warmup_iters=50")
    assert "end of warmup" not in dict(landmarks(longer))


def test_report_gives_layout_cost_and_files() -> None:
    run = run_of(
        "num_layers=4",
        "base_num_layers=4",
        "pipeline_model_parallel_size=2",
        "use_distributed_optimizer=true",
        "checkpoint.save=out",
        "save_interval=2",
        "keep_last=1",
        "save_retain_interval=4",
        "metrics_path=out/m.jsonl",
    )
    report = dry_run(run, world_size=4)
    layout = dict(layout_lines(report))
    assert layout["data parallel"] == "2, distributed optimizer"
    assert layout["batch"] == "4 sequences of 16 tokens: 1 microbatches of 2 on each rank"
    assert layout["pipeline bubble"] == "50.0% of a step"
    cost = dict(cost_lines(report))
    # 6 (4 x 49152 + 6144 + 4 x 2 x 16 x 64) FLOPs a token; 64 tokens a step, 6 steps.
    assert cost["model FLOPs per token"] == "1.266e+06"
    assert cost["model FLOPs per step"] == "8.1e+07, 2.025e+07 on each rank"
    assert cost["model FLOPs of the run"] == "4.86e+08"
    files = file_lines(report)
    assert files[0] == ("data", "elsewhere/train: not on this machine, not checked")
    assert "3 checkpoints of 0.0 GiB, the last 1 are kept, and every multiple" in files[1][1]
    assert files[2] == ("logging.metrics_path", "out/m.jsonl")


def test_equal_stages_share_a_row_of_the_report() -> None:
    run = run_of(
        "num_layers=8",
        "base_num_layers=8",
        "pipeline_model_parallel_size=8",
        "global_batch_size=2",
    )
    text = render(dry_run(run))
    assert "1-6" in text
    assert "in 50 logical tensors" in text


def test_a_world_size_without_a_dry_run_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ROOT / "examples/first_run/config.yaml"
    arguments = ["megatron-mup", "train", "--config", str(config), "--world-size", "4"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit):
        cli.main()
    assert "--world-size 4 is for --dry-run" in capsys.readouterr().err


def test_10b_on_64_gpus_takes_seconds_and_little_memory_and_writes_nothing(tmp_path: Path) -> None:
    config = ROOT / "launch/configs/mup_10b.yaml"
    command = [sys.executable, "-m", "megatron_mup", "train", "--config", str(config), "lr=0.01"]
    command += ["tensor_model_parallel_size=4", "pipeline_model_parallel_size=2"]
    output = tmp_path / "out.txt"
    work = tmp_path / "work"
    work.mkdir()
    with output.open("w") as stream:
        process = subprocess.Popen(
            [*command, "--dry-run", "--world-size", "64"],
            stdout=stream,
            stderr=subprocess.STDOUT,
            cwd=work,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )
        _, status, usage = os.wait4(process.pid, 0)
    text = output.read_text()
    assert os.waitstatus_to_exitcode(status) == 0, text
    # 12 layers of 12 x 8192 x 8192, and two matrices of 32128 x 8192.
    assert "10,190,061,568, as in the table" in text
    # A quarter of six layers, and a quarter of the embedding or of the readout.
    assert text.count("1,273,757,696") == 2
    assert "8, distributed optimizer" in text
    assert list(work.iterdir()) == []
    # Importing torch and megatron is nearly all of it; the weights alone would take 20 GB.
    assert usage.ru_utime + usage.ru_stime < 60
    assert usage.ru_maxrss < 2 * 2**20
