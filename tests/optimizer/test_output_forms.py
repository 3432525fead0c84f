"""The two published forms of the output layer are one function over AdamW training, in fp64.

Folded: W_U small, LR alpha/m. Multiplier: W' = m W_U, logits divided by m, LR alpha, eps and
coupled decay divided by m. The loss is computed here from the logits and the clipping is off.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as functional

from megatron_mup.config import RunConfig
from megatron_mup.model.gpt import build_model
from megatron_mup.model.naming import rows_of_parameters
from megatron_mup.parameterization.table import ParameterTable, TableRow
from megatron_mup.training.processes import Launch, parallel_processes
from tests.configurations import tiny
from tests.random_samples import RandomSamples

_OUTPUT = "output_layer.weight"
_M = 3.0
Change = Callable[[TableRow], TableRow]


def run_of(form: str, mode: str) -> RunConfig:
    """One layer of width 48 over a base of 16: m = 3, so that nothing is exact by accident."""
    return tiny(
        "num_layers=1",
        "hidden_size=48",
        "num_attention_heads=3",
        "base_hidden_size=16",
        "base_ffn_hidden_size=64",
        f"output_form={form}",
        f"weight_decay_mode={mode}",
        "weight_decay=0.01",
        "adam_eps=0.001",
        "lr=0.02",
    )


def adamw(model: torch.nn.Module, table: ParameterTable) -> torch.optim.AdamW:
    """PyTorch's AdamW with the table's numbers."""
    rows = rows_of_parameters(model, table)
    groups = [
        {
            "params": [parameter],
            "lr": rows[name][0].lr,
            "weight_decay": rows[name][0].weight_decay,
            "eps": rows[name][0].eps,
        }
        for name, parameter in model.named_parameters()
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95))


def trained_logits(
    run: RunConfig, weights: dict[str, torch.Tensor], change: Change = lambda row: row
) -> list[torch.Tensor]:
    """Logits [B, S, V] before each of 20 steps and after the last one."""
    table = ParameterTable(
        rows=tuple(change(row) for row in run.table.rows), multipliers=run.table.multipliers
    )
    samples = RandomSamples(96, 16)
    rows = [samples[index] for index in range(4)]
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    history = []
    with parallel_processes(run, Launch()):
        model = build_model(run, run.table).double()
        model.load_state_dict(weights, strict=False)
        optimizer = adamw(model, table)
        for _ in range(20):
            logits = model(batch["tokens"], batch["position_ids"], None)
            history.append(logits.detach())
            optimizer.zero_grad()
            functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()).backward()
            optimizer.step()
        with torch.no_grad():
            history.append(model(batch["tokens"], batch["position_ids"], None))
    return history


@functools.cache
def folded_weights() -> dict[str, torch.Tensor]:
    """Initial weights of the folded form, fp64."""
    run = run_of("folded", "coupled")
    with parallel_processes(run, Launch()):
        model = build_model(run, run.table).double()
        return {name: value.detach().clone() for name, value in model.named_parameters()}


def unfolded_weights() -> dict[str, torch.Tensor]:
    weights = folded_weights()
    return {**weights, _OUTPUT: weights[_OUTPUT] * _M}


@functools.cache
def folded_logits(mode: str) -> list[torch.Tensor]:
    return trained_logits(run_of("folded", mode), folded_weights())


def largest_difference(left: list[torch.Tensor], right: list[torch.Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("mode", ["coupled", "constant_product", "independent"])
def test_both_output_forms_are_the_same_function_over_twenty_steps(mode: str) -> None:
    folded = folded_logits(mode)
    multiplier = trained_logits(run_of("multiplier", mode), unfolded_weights())
    assert largest_difference(folded, multiplier) < 1e-10
    # They trained: the last logits are far from the first ones.
    assert (folded[-1] - folded[0]).abs().max().item() > 0.1


def unconverted_eps(row: TableRow) -> TableRow:
    return dataclasses.replace(row, eps=0.001)


def unconverted_decay(row: TableRow) -> TableRow:
    return dataclasses.replace(row, weight_decay=0.01)


def unconverted_rate(row: TableRow) -> TableRow:
    is_output = row.tensor.name == _OUTPUT
    return dataclasses.replace(row, lr=row.lr / _M) if is_output else row


@pytest.mark.parametrize("change", [unconverted_eps, unconverted_decay, unconverted_rate])
def test_each_conversion_of_the_multiplier_form_is_needed(change: Change) -> None:
    folded = folded_logits("coupled")
    multiplier = trained_logits(run_of("multiplier", "coupled"), unfolded_weights(), change)
    assert torch.allclose(folded[0], multiplier[0], rtol=0.0, atol=1e-12)
    assert largest_difference(folded, multiplier) > 1e-6


def test_the_forms_start_from_the_same_function() -> None:
    run = run_of("multiplier", "coupled")
    with parallel_processes(run, Launch()):
        own = dict(build_model(run, run.table).named_parameters())
    for name, weight in unfolded_weights().items():
        torch.testing.assert_close(own[name].detach().double(), weight, rtol=3e-7, atol=0.0)
