"""Resuming on a GPU: bit for bit in deterministic mode, and from a checkpoint of a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gpu.command_runs import steps_of, write_config
from tests.gpu.conftest import Measured
from tests.gpu.test_transformer_engine import ENGINE

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(420)]

DETERMINISTIC = (ENGINE, "bf16=true", "deterministic_mode=true")
CELLS = {
    "bf16": (),
    # The history of maxima is in the checkpoint.
    "FP8 delayed": ("fp8_format=hybrid", "fp8_recipe=delayed", "fp8_amax_history_len=4"),
    "FP8 tensorwise": ("fp8_format=hybrid", "fp8_recipe=tensorwise"),
}

# The order of the text depends on the length of the run, so both have the same.
SAVING = ("train_iters=6", "save_interval=3")
RESUMING = ("train_iters=6", "ckpt_step=3")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("text"))


@pytest.mark.parametrize("cell", CELLS)
def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(
    cell: str, config: Path, measured: Measured
) -> None:
    options, save = (*DETERMINISTIC, *CELLS[cell]), config.with_name(f"saved {cell}")
    whole = steps_of(config, f"{cell} whole", *options, *SAVING, f"save={save}")
    resumed = steps_of(config, f"{cell} resumed", *options, *RESUMING, f"load={save}")
    measured("losses", ", ".join(f"{step[0]:.6f}" for step in whole.values()))

    assert sorted(resumed) == [4, 5, 6]
    assert resumed == {step: whole[step] for step in resumed}


def test_a_checkpoint_written_on_a_cpu_goes_on_on_the_gpu(config: Path, measured: Measured) -> None:
    save = config.with_name("saved by a CPU")
    on_cpu = steps_of(config, "CPU", *SAVING, f"save={save}", on_cpu=True)
    on_gpu = steps_of(config, "GPU", *RESUMING, f"load={save}")
    largest = max(abs(on_gpu[step][0] / on_cpu[step][0] - 1) for step in on_gpu)
    measured("largest relative difference of losses", largest)

    assert sorted(on_gpu) == [4, 5, 6]
    # fp32 sums of another order, 2^-24 each, over three updates.
    assert largest < 1e-4
