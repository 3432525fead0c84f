"""Underflow and saturation of FP8 by arithmetic, and the observer on a model of the local spec."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_mup.diagnostics.fp8_ranges import (
    E4M3,
    E5M2,
    Fp8Ranges,
    Kind,
    fp8_range,
    linear_input,
    meta_scale,
    worst_by_matrix,
)
from megatron_mup.errors import ConfigError
from megatron_mup.training.loop import TrainData, train
from tests.configurations import tiny
from tests.random_samples import RandomSamples


@pytest.mark.parametrize(
    ("number_format", "dtype"), [(E4M3, torch.float8_e4m3fn), (E5M2, torch.float8_e5m2)]
)
def test_formats_are_those_of_the_hardware(number_format: object, dtype: torch.dtype) -> None:
    numbers = torch.finfo(dtype)
    assert (number_format.largest, number_format.smallest) == (  # type: ignore[attr-defined]
        numbers.max,
        numbers.smallest_normal * numbers.eps,
    )


def test_underflow_and_saturation_are_counted_by_the_scale() -> None:
    # 2^-10 is half of E4M3's smallest value, a tie that becomes 0; zeros are not lost.
    tensor = torch.tensor([0.0, 2**-11, 2**-10, 1.5 * 2**-10, 2**-9, 1.0, 448.0, 449.0, -1000.0])
    found = fp8_range(tensor, E4M3, scale=1.0)
    assert (found.amax, found.saturation) == (1000.0, pytest.approx(2 / 9))
    assert found.underflow == pytest.approx(2 / 8)
    assert float(tensor[2].to(torch.float8_e4m3fn)) == 0.0
    assert float(tensor[3].to(torch.float8_e4m3fn)) == float(tensor[4]) == 2**-9
    quartered = fp8_range(tensor, E4M3, scale=0.25)
    assert (quartered.underflow, quartered.saturation) == (pytest.approx(4 / 8), 0.0)


def test_current_scaling_saturates_nothing() -> None:
    tensor = torch.tensor([3.0, 3e-6, 0.0])
    assert fp8_range(tensor, E4M3).saturation == 0.0
    # 3 becomes 448, and 3e-6 becomes 4.48e-4, less than 2^-10 = 9.8e-4.
    assert fp8_range(tensor, E4M3).underflow == 0.5
    assert fp8_range(tensor, E5M2).underflow == 0.0
    assert fp8_range(torch.zeros(4), E4M3).underflow == 0.0


def test_delayed_scales_are_read_where_transformer_engine_keeps_them() -> None:
    module = torch.nn.Linear(2, 2)
    assert meta_scale(module, Kind.INPUT) is None
    module.fp8_meta = {
        "scaling_fwd": SimpleNamespace(scale=torch.tensor([2.0, 4.0, 8.0])),
        "scaling_bwd": SimpleNamespace(scale=torch.tensor([16.0, 32.0])),
    }
    assert [meta_scale(module, kind) for kind in Kind] == [2.0, 4.0, 16.0]
    # Current scaling has states without scales.
    module.fp8_meta = {"scaling_fwd": SimpleNamespace(), "scaling_bwd": SimpleNamespace()}
    assert meta_scale(module, Kind.WEIGHT) is None


def test_the_norm_inside_a_layer_is_applied_first() -> None:
    inputs = torch.tensor([[3.0, 4.0]])
    plain = torch.nn.Linear(2, 2)
    assert linear_input(plain, inputs) is inputs
    plain.layer_norm_weight, plain.eps = torch.nn.Parameter(torch.tensor([1.0, 2.0])), 0.0
    # The root mean square of 3 and 4 is 3.5355.
    assert linear_input(plain, inputs).tolist() == [
        pytest.approx([3 / 3.5355339, 2 * 4 / 3.5355339])
    ]


def test_every_matrix_of_a_run_is_measured_at_the_due_steps_and_nothing_changes() -> None:
    run = tiny("train_iters=4")
    samples = RandomSamples(run.model.vocab_size, run.model.seq_length)

    def losses(observer: Fp8Ranges | None) -> list[float]:
        result = train(run, data=TrainData(samples), observer=observer, echo=lambda _line: None)
        return [row["lm loss"] for row in result.history if "lm loss" in row]

    observer = Fp8Ranges(run, interval=2)
    assert losses(observer) == losses(None)
    # Two steps, two layers, four matrices, three tensors.
    assert len(observer.records) == 2 * 2 * 4 * 3
    assert {record.iteration for record in observer.records} == {2, 4}
    assert {record.layer for record in observer.records} == {1, 2}
    worst = worst_by_matrix(observer.records)
    assert set(worst) == {
        (matrix, kind) for matrix in ("qkv", "attention_out", "ffn_in", "ffn_out") for kind in Kind
    }
    # Inputs behind an RMSNorm of 64 elements: between 1 and sqrt(64).
    assert 1 < worst["qkv", Kind.INPUT].amax < 8
    assert worst["qkv", Kind.GRADIENT].amax < worst["qkv", Kind.INPUT].amax
    assert all(found.saturation == 0 for found in worst.values())


def test_what_cannot_be_measured_is_refused() -> None:
    fp8 = (
        "transformer_impl=transformer_engine",
        "bf16=true",
        "fp8_format=hybrid",
        "fp8_recipe=blockwise",
    )
    with pytest.raises(ConfigError, match="fp8_recipe is blockwise; use delayed or tensorwise"):
        Fp8Ranges(tiny(*fp8), interval=1)
    with pytest.raises(ConfigError, match="spread over 2; set the sizes of parallel to 1"):
        Fp8Ranges(tiny("tensor_model_parallel_size=2"), interval=1)
