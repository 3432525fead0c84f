"""Logits and gradients of one batch, tensor by tensor, and how far two models' are apart.

Shape suffixes: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_mup import platform
from megatron_mup.config import RunConfig
from megatron_mup.model.gpt import build_model
from megatron_mup.model.initialization import part_view
from megatron_mup.model.naming import rows_of_parameters
from megatron_mup.training.processes import Launch, parallel_processes
from tests.random_samples import RandomSamples

LOGITS = "logits"


@dataclass(frozen=True)
class Batch:
    """Two samples [B, S] on this process's device."""

    tokens: Tensor
    labels: Tensor
    positions: Tensor


def batch_of(run: RunConfig) -> Batch:
    """Random tokens, the same for every run of a shape."""
    samples = RandomSamples(run.model.vocab_size, run.model.seq_length)
    rows = [samples[row] for row in range(2)]
    tokens, labels, positions = (
        torch.stack([row[key] for row in rows]).to(platform.device())
        for key in ("tokens", "labels", "position_ids")
    )
    return Batch(tokens, labels, positions)


def differentiate(model: torch.nn.Module, batch: Batch) -> Tensor:
    """Leave the gradient of the mean token loss in the parameters; logits [B, S, V], fp32."""
    with torch.no_grad():
        logits = model(batch.tokens, batch.positions, None).float()
    losses = model(batch.tokens, batch.positions, None, labels=batch.labels)
    losses.float().mean().backward()
    return logits


def logits_and_gradients(run: RunConfig) -> dict[str, Tensor]:
    """Logits, and the gradient of every logical tensor by its name; fp64 on the CPU.

    A freshly built model: initial weights depend on names and seed alone, so that runs which
    differ in layer spec and precision have the same.
    """
    with parallel_processes(run, Launch()):
        model = build_model(run, run.table)
        found = {LOGITS: differentiate(model, batch_of(run))}
        parameters = dict(model.named_parameters())
        for local, rows in rows_of_parameters(model, run.table).items():
            gradient = parameters[local].grad
            assert gradient is not None, f"{local} has no gradient"
            for row in rows:
                found[row.tensor.name] = part_view(gradient, row.tensor.part, run.model.shape)
        return {name: tensor.double().cpu() for name, tensor in found.items()}


def relative_errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Norm of the difference over the norm of what is expected, tensor by tensor."""
    assert found.keys() == expected.keys()
    return {
        name: float((found[name] - expected[name]).norm() / expected[name].norm())
        for name in expected
    }
