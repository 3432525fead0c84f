"""Log-probabilities from Megatron's forward pass, with weights read from a ``WeightSource``.

The model is this package's GPTModel on one rank, with the local layer spec and without DDP or
pipeline. It is what trained the weights, so it is the reference of every conversion. Owns the way
from logical tensors back to Megatron's fused parameters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from megatron_mup import platform
from megatron_mup.config import ModelConfig, RunConfig, TransformerImpl
from megatron_mup.config.optimization import OptimizerSection
from megatron_mup.config.running import TrainingConfig
from megatron_mup.convert.layerwise import (
    Fetch,
    blocks_of,
    sliced_logprobs,
    streamed,
    without_weights,
)
from megatron_mup.convert.weights import WeightSource
from megatron_mup.errors import CheckpointError
from megatron_mup.model.gpt import construct, transformer_config
from megatron_mup.model.initialization import part_view
from megatron_mup.parameterization.evaluation import Multipliers
from megatron_mup.parameterization.options import Parameterization, ParameterizationConfig
from megatron_mup.parameterization.roles import LogicalTensor, by_parameter, logical_tensors
from megatron_mup.training.processes import Launch, parallel_processes

_EMBEDDING = "embedding.word_embeddings.weight"
_READOUT = "output_layer"


@torch.no_grad()
def megatron_logprobs(source: WeightSource, tokens_BS: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Log-probabilities of the next tokens under Megatron's forward pass.

    Weights are read layer by layer and cast to ``dtype``, in which everything is computed.

    Args:
        source: the weights; each logical tensor is read once, the tied embedding twice.
        tokens_BS: int64 ids [B, S].
        dtype: float32, bfloat16, float16, or float64 (rotary angles stay in fp32).

    Returns:
        float64 [B, S - 1] on the CPU.

    Raises:
        CheckpointError: a tensor cannot be read, or see ``single_rank``.
    """
    run = _run(source.model)
    with single_rank(source.model):
        device = platform.device()
        with without_weights():
            gpt = _gpt(run, source.multipliers, dtype).eval()
        blocks = blocks_of(gpt)
        if not source.model.untie_embeddings_and_output_weights:
            # GPTModel hands the tied matrix over in the call: the readout owns no weight.
            blocks[_READOUT] = (*blocks.get(_READOUT, ()), _EMBEDDING)
        tokens_BS = tokens_BS.to(device)
        with streamed(gpt, blocks, _fetch(source), device=device, kept=_READOUT):
            return _logprobs(gpt, tokens_BS, source.model.padded_vocab_size)


def _logprobs(gpt: Any, tokens_BS: Tensor, vocabulary: int) -> Tensor:
    """The decoder once, then readout and all that follows it for few positions at a time."""
    positions_BS = torch.arange(tokens_BS.shape[1], device=tokens_BS.device).expand_as(tokens_BS)
    # As on the first of two pipeline stages.
    gpt.post_process = False
    hidden_SBM = gpt(tokens_BS, positions_BS, None)
    gpt.post_process = True

    def logits_at(first: int, last: int) -> Tensor:
        gpt.decoder.forward = lambda *_inputs, **_options: hidden_SBM[first:last]
        logits_BPV: Tensor = gpt(tokens_BS, positions_BS, None, decoder_input=hidden_SBM)
        return logits_BPV

    return sliced_logprobs(logits_at, tokens_BS, vocabulary=vocabulary)


@contextmanager
def single_rank(model: ModelConfig) -> Iterator[None]:
    """Megatron's groups for one process; those that are there already are used and left alone.

    Args:
        model: any model; the groups do not depend on it.

    Raises:
        CheckpointError: the process has groups that split models.
    """
    # Not at the top: the platform must be prepared before megatron is imported.
    from megatron.core import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        with parallel_processes(_run(model), Launch()):
            yield
        return
    ranks = parallel_state.get_model_parallel_group().size()
    if ranks != 1:
        raise CheckpointError(
            f"this process is one of {ranks} that share a model; run the check in a process of its "
            "own: megatron-mup convert"
        )
    yield


def _run(model: ModelConfig) -> RunConfig:
    """A run around a model; only its model and its layout (one rank) are used."""
    return RunConfig(
        # TransformerEngine's modules need a GPU; the local ones compute the same function.
        model=dataclasses.replace(model, transformer_impl=TransformerImpl.LOCAL),
        parameterization=ParameterizationConfig(name=Parameterization.SP),
        optimizer=OptimizerSection(lr=1.0),
        training=TrainingConfig(train_iters=1, global_batch_size=1, micro_batch_size=1),
    )


def _gpt(run: RunConfig, multipliers: Multipliers, dtype: torch.dtype) -> torch.nn.Module:
    config: Any = transformer_config(run, multipliers)
    config.params_dtype = config.pipeline_dtype = dtype
    config.bf16, config.fp16 = dtype is torch.bfloat16, dtype is torch.float16
    # Otherwise upstream would allocate every parameter on the GPU first.
    config.use_cpu_initialization = True
    return construct(run.model, config, multipliers)


def _fetch(source: WeightSource) -> Fetch:
    """Megatron's parameters by name, put together from the logical tensors of a source."""
    shape = source.model.shape
    parts = by_parameter(logical_tensors(shape))

    def fetch(name: str) -> Tensor:
        if len(parts[name]) == 1:
            return source.read(parts[name][0].name)
        whole = torch.empty(_fused_shape(parts[name]))
        for tensor in parts[name]:
            view = part_view(whole, tensor.part, shape)
            view.copy_(source.read(tensor.name).view(view.shape))
        return whole

    return fetch


def _fused_shape(parts: tuple[LogicalTensor, ...]) -> tuple[int, ...]:
    return (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
