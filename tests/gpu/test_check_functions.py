"""The functions behind the GPU checks, without a GPU: the local spec in the engine's place."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_mup.model.gpt import build_model
from megatron_mup.training.processes import Launch, parallel_processes
from tests.configurations import tiny
from tests.gpu.attention import backends_called, observed_scale
from tests.gpu.bands import band
from tests.gpu.command_runs import losses, steps_of, write_config
from tests.gpu.comparison import LOGITS, logits_and_gradients, relative_errors
from tests.gpu.coordinates import failing
from tests.gpu.measured import rows_of, table, write
from tests.gpu.stock import AT_BASE, different, ours_and_stock
from tests.gpu.test_resume import RESUMING, SAVING
from tests.gpu.test_transformer_engine import BF16_ERROR, OPTIONS


def test_bf16_of_one_spec_is_within_what_the_specs_may_differ_by() -> None:
    exact = logits_and_gradients(tiny(*OPTIONS))
    errors = relative_errors(logits_and_gradients(tiny(*OPTIONS, "bf16=true")), exact)

    # Two layers of six tensors (query, key and value apart), embedding, readout and the logits.
    assert len(errors) == 2 * 6 + 2 + 1
    assert min(errors.values()) > 0.001
    assert max(errors.values()) < BF16_ERROR


def test_a_wrong_multiplier_is_far_outside_it() -> None:
    exact = logits_and_gradients(tiny(*OPTIONS))
    for wrong in ("residual_multiplier=0.55", "attention_scale=inverse_sqrt"):
        errors = relative_errors(logits_and_gradients(tiny(*OPTIONS, wrong)), exact)
        assert max(errors.values()) > 3 * BF16_ERROR, wrong


def test_the_same_weights_give_the_same_logits() -> None:
    run = tiny(*OPTIONS)
    first, again = logits_and_gradients(run), logits_and_gradients(run)
    assert relative_errors(first, again)[LOGITS] == 0.0


@pytest.mark.parametrize(("option", "scale"), [("inverse", 1 / 64), ("inverse_sqrt", 1 / 8)])
def test_the_observed_scale_is_the_tables(option: str, scale: float) -> None:
    run = tiny(*OPTIONS, f"attention_scale={option}")
    with parallel_processes(run, Launch()):
        core = build_model(run, run.table).decoder.layers[0].self_attention.core_attention
    like = torch.empty(0)
    assert observed_scale(core, run.model, expected=scale, like=like) == pytest.approx(scale)
    # The key is made for the expected scale; another one is seen all the same, as far as the weight
    # can be told from 1.
    assert observed_scale(core, run.model, expected=scale * 2, like=like) == pytest.approx(scale)
    bf16 = like.bfloat16()
    assert observed_scale(core, run.model, expected=scale, like=bf16) == pytest.approx(
        scale, rel=0.01
    )
    assert observed_scale(core, run.model, expected=scale / 8, like=bf16) > 2 * scale


def test_the_backend_that_is_called_is_the_one_that_is_counted() -> None:
    core = torch.nn.Module()
    core.fused_attention, core.flash_attention = torch.nn.Identity(), torch.nn.Identity()
    model = torch.nn.Sequential(core)
    with backends_called(model) as calls:
        for _ in range(3):
            core.fused_attention(torch.zeros(1))
    core.flash_attention(torch.zeros(1))
    assert calls == {"fused_attention": 3}


def test_stock_and_ours_are_compared_bit_for_bit() -> None:
    ours, stock = ours_and_stock(tiny(*AT_BASE))
    # Logits, embedding, readout, and four matrices in each of two layers.
    assert len(ours) == 1 + 2 + 2 * 4
    assert different(ours, stock) == []
    other, _ = ours_and_stock(tiny(*AT_BASE, "residual_multiplier=1.001"))
    assert LOGITS in different(other, stock)


def test_distances_of_loss_curves() -> None:
    reference = [2.0] * 100
    shifted = [2.0] * 50 + [2.02] * 50
    assert band(shifted, reference).last_50 == pytest.approx(0.01)
    assert band(shifted, reference).any_10 == pytest.approx(0.01)
    # One step in ten that is 10% off is 1% of their mean.
    spike = [2.0] * 60 + [2.2] + [2.0] * 39
    assert band(spike, reference).any_10 == pytest.approx(0.01)
    assert band([1.9] * 100, reference).last_50 == pytest.approx(-0.05)


def test_coordinates_of_sp_fail_and_those_of_mup_do_not() -> None:
    options = ("model.seq_length=16", "model.vocab_size=64")
    widths = (32, 64, 128)
    assert failing("baseline", widths, options, head_dim=16) == {}
    wrong = failing("sp_simple", widths, options, head_dim=16, seeds=1)
    assert wrong["layer 2 residual"].startswith("grows at step 1, slope 0.")


def test_a_checkpoint_of_one_process_goes_on_in_another(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    small = ("hidden_size=64", "num_attention_heads=4", "base_kv_channels=16", "seq_length=32")
    whole = steps_of(config, "whole", *small, *SAVING, f"save={tmp_path / 'saved'}", on_cpu=True)
    resumed = steps_of(
        config, "resumed", *small, *RESUMING, f"load={tmp_path / 'saved'}", on_cpu=True
    )
    assert sorted(whole) == [1, 2, 3, 4, 5, 6]
    assert resumed == {step: whole[step] for step in (4, 5, 6)}
    assert losses(resumed) == [whole[4][0], whole[5][0], whole[6][0]]


def test_a_run_that_fails_shows_its_output(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: {hidden: 3}\n")
    with pytest.raises(AssertionError, match="unknown"):
        steps_of(tmp_path / "config.yaml", "wrong")


def test_measured_numbers_become_a_table_and_json(tmp_path: Path) -> None:
    def report(when: str, outcome: str, **values: object) -> SimpleNamespace:
        return SimpleNamespace(
            nodeid="tests/gpu/test_a.py::test_b",
            when=when,
            outcome=outcome,
            duration=1.234,
            user_properties=list(values.items()),
        )

    rows = rows_of(
        [
            report("setup", "passed"),
            report("call", "failed", error=0.012345, scale=float("inf"), backend="cuDNN"),
            report("teardown", "passed"),
            report("setup", "error"),
        ]
    )
    write(tmp_path / "measured.json", rows)

    assert table(rows).splitlines() == [
        "failed      1.2 s  test_a.py::test_b",
        "                   error = 0.01235",
        "                   scale = inf",
        "                   backend = cuDNN",
        "error       1.2 s  test_a.py::test_b",
    ]
    assert json.loads((tmp_path / "measured.json").read_text())[0] == {
        "test": "test_a.py::test_b",
        "outcome": "failed",
        "seconds": 1.23,
        "values": {"error": 0.012345, "scale": "inf", "backend": "cuDNN"},
    }
