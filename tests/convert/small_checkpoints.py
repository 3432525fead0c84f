"""Small real checkpoints of this package, made in this process in well under a second each.

Nothing in them is a value that a forgotten tensor or multiplier could have by chance: gains, biases
and queries are random, bf16 main weights differ from the weights, and no multiplier is 1.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_mup.checkpoint.save import save_checkpoint
from megatron_mup.config import RunConfig
from megatron_mup.model.naming import canonical_names
from megatron_mup.optimizer.main_weights import main_weights, single_optimizers
from megatron_mup.training.processes import Launch, parallel_processes
from megatron_mup.training.state import TrainState, build_state
from tests.checkpoint.short_runs import step
from tests.configurations import tiny

MULTIPLIERS = ("embedding_multiplier=2.5", "residual_multiplier=0.3", "logit_multiplier=1.7")
"""With the attention scale 1/16 of ``tiny``'s head dim of 16, no multiplier is 1 or plain."""

LLAMA = ("activation=swiglu", "norm_gain=vector", "ffn_hidden_size=96")
"""A model that Llama and Granite can hold."""
GQA = (*LLAMA, "num_query_groups=2")
MQA = (*LLAMA, "num_query_groups=1")
TIED = (
    *LLAMA,
    "untie_embeddings_and_output_weights=false",
    "output_form=multiplier",
)
PAPER = ("activation=squared_relu", "norm_gain=none")
"""The gain-free architecture of arXiv:2404.05728, which only our own format holds."""
BIASES = ("add_bias_linear=true", "unembedding_bias=true", "norm_gain=vector")

MakeCheckpoint = Callable[..., Path]
"""``make(*overrides, steps=0)``: the ``iter_*`` folder; made once per session."""


def small_run(*overrides: str) -> RunConfig:
    """``tiny`` of ``tests.configurations`` with multipliers and with overrides."""
    return tiny(*MULTIPLIERS, *overrides)


def save_small(root: Path, *overrides: str, steps: int = 0) -> Path:
    """Save one checkpoint.

    Args:
        root: the run's folder.
        overrides: ``key=value`` on top of ``small_run``.
        steps: training steps after the random values, for moments that are not zero.

    Returns:
        The checkpoint's folder.
    """
    run = small_run(*overrides)
    with parallel_processes(run, Launch()):
        state = build_state(run)
        randomize(state)
        for _ in range(steps):
            step(state)
        folder = save_checkpoint(state, root)
    return folder


def randomize(state: TrainState) -> None:
    """Give every parameter of a single rank a random value that follows from its name."""
    main = {
        id(held.parameter): held
        for part, _ in single_optimizers(state.optimizer)
        for held in main_weights(part, state.model_chunks)
    }
    with torch.no_grad():
        for chunk in state.model_chunks:
            names = canonical_names(chunk)
            for local, parameter in chunk.named_parameters():
                if local not in names:
                    continue
                values = random_values(names[local], tuple(parameter.shape))
                parameter.copy_(values)
                held = main[id(parameter)]
                if held.main is not parameter:
                    first = held.start or 0
                    held.main.view(-1).copy_(values.view(-1)[first : first + held.main.numel()])


def random_values(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Float32 values of one parameter of Megatron: gains around 1, biases and weights around 0."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    noise = torch.randn(shape, generator=generator)
    if "norm" in name:
        return 1 + 0.3 * noise
    return noise * (0.2 if len(shape) == 1 else shape[1] ** -0.5)
