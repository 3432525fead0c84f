"""TransformerEngine's layer spec against the local one, on a GPU."""

from __future__ import annotations

import pytest
import torch

from megatron_mup import platform
from megatron_mup.config import RunConfig
from megatron_mup.model.gpt import build_model
from megatron_mup.training.processes import Launch, parallel_processes
from tests.configurations import tiny
from tests.random_samples import RandomSamples

pytestmark = pytest.mark.gpu

# Every multiplier differs from 1, and head dim 16 makes 1/D differ from 1/sqrt(D) by 4.
OPTIONS = [
    "residual_multiplier=0.5",
    "embedding_multiplier=2",
    "output_form=multiplier",
    "num_query_groups=2",
    "bf16=true",
]


def logits_and_scales(run: RunConfig) -> tuple[torch.Tensor, set[float]]:
    """Logits of one batch and the scales of all attention backends."""
    samples = RandomSamples(run.model.vocab_size, run.model.seq_length)
    device = platform.device()
    tokens = torch.stack([samples[row]["tokens"] for row in range(2)]).to(device)
    positions = torch.arange(run.model.seq_length, device=device).expand_as(tokens)
    with parallel_processes(run, Launch()):
        model = build_model(run, run.table)
        with torch.no_grad():
            logits = model(tokens, positions, None)
        scales = {
            module.softmax_scale for module in model.modules() if hasattr(module, "softmax_scale")
        }
    return logits.float().cpu(), scales


def test_transformer_engine_computes_what_the_local_spec_computes() -> None:
    local, _ = logits_and_scales(tiny(*OPTIONS))
    engine, scales = logits_and_scales(tiny(*OPTIONS, "transformer_impl=transformer_engine"))
    assert scales == {1 / 16}
    # bf16 has 8 bits of mantissa: 2^-8 per rounding, a few roundings deep.
    assert torch.allclose(engine, local, rtol=0.05, atol=0.05 * float(local.abs().max()))
