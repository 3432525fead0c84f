"""Seconds that one GPU computes for one microbatch: matrix products, attention, the rest.

A matrix product takes the longer of its FLOPs at the stated share of the peak and its bytes at the
stated share of the memory's bandwidth, so that small ones are slow. In FP8 the casts are added:
inputs and gradients are read once and written twice (as they are, transposed); delayed scaling
needs no other pass for the maximum. Everything else is bytes. Counts are ours, of upstream's
modules (0.19.2). Notation as in ``flops.py``; T tokens of a microbatch, t tensor-parallel ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_mup.config import (
    Activation,
    RecomputeGranularity,
    RecomputeMethod,
    RunConfig,
)
from megatron_mup.flops import model_flops_per_sequence
from megatron_mup.memory import ChunkContents, has_unfused_attention, runs_in_fp8
from megatron_mup.planning.assumptions import Rates
from megatron_mup.planning.gpus import Gpu

_BF16_BYTES = 2
_CAST_BYTES = 4
"""Of one element: read in bf16, written twice in FP8."""

_KERNELS = 30
"""Of a layer's forward pass; the backward pass has twice as many. Assumption (ours)."""

_ACTIVATION_PASSES = {
    Activation.RELU: 2,
    Activation.SQUARED_RELU: 4,
    Activation.GELU: 2,
    Activation.SWIGLU: 8,
}
"""Times that a tensor of width F is read or written: no fused kernels, see ``model/gpt.py``."""

_LOGIT_BYTES = 48
"""Of one logit: fp32 copy, maximum, difference, exponential, sum, quotient, gradient, cast."""

_SCORE_BYTES = 24
"""Of one score of unfused attention: scale, mask, softmax in fp32, cast."""

_ATTENTION_BACKWARD = 2.5
"""FLOPs of fused attention's backward pass, which computes the scores again, over its forward."""


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """Time of a pass over one microbatch.

    Attributes:
        forward: of the forward pass.
        backward: of the backward pass, what is recomputed included.
    """

    forward: float
    backward: float

    @property
    def total(self) -> float:
        """Of both."""
        return self.forward + self.backward


@dataclass(frozen=True, kw_only=True)
class Speed:
    """A GPU at one end of the assumptions."""

    gpu: Gpu
    rates: Rates

    @property
    def bytes_per_second(self) -> float:
        """Of the device's memory, reached."""
        return self.gpu.memory_terabytes_per_second * 1e12 * self.rates.memory_efficiency

    def product(self, rows: float, inner: float, columns: float, *, fp8: bool) -> float:
        """Seconds of a product [rows, inner] x [inner, columns], without FP8's casts."""
        rates = self.rates
        efficiency = rates.matrix_efficiency_fp8 if fp8 else rates.matrix_efficiency_bf16
        work = 2 * rows * inner * columns / (efficiency * self.gpu.peak_flops(fp8=fp8))
        size = 1 if fp8 else _BF16_BYTES
        moved = size * (rows * inner + inner * columns) + _BF16_BYTES * rows * columns
        return max(work, self.moved(moved)) + rates.launch_seconds

    def cast(self, elements: float) -> float:
        """Seconds of casting so many bf16 elements to FP8."""
        return self.moved(_CAST_BYTES * elements) + self.rates.launch_seconds

    def moved(self, count: float) -> float:
        """Seconds of so many bytes."""
        return count / self.bytes_per_second


def stage_seconds(run: RunConfig, chunks: tuple[ChunkContents, ...], speed: Speed) -> Seconds:
    """One microbatch through all chunks of a pipeline rank.

    Args:
        run: the run's configuration, in a layout.
        chunks: of the rank.
        speed: GPU and rates.

    Returns:
        Forward and backward pass.
    """
    forward = backward = 0.0
    for chunk in chunks:
        in_fp8 = [runs_in_fp8(run, layer) for layer in chunk.layers]
        for fp8 in (False, True):
            count = in_fp8.count(fp8)
            if count:
                layer = layer_seconds(run, speed, fp8=fp8)
                forward += count * layer.forward
                backward += count * layer.backward
        backward += sum(
            _again(run, position, speed, fp8=fp8) for position, fp8 in enumerate(in_fp8)
        )
        if chunk.readout:
            readout = _readout(run, speed)
            forward += readout.forward
            backward += readout.backward
    return Seconds(forward=forward, backward=backward)


def layer_seconds(run: RunConfig, speed: Speed, *, fp8: bool) -> Seconds:
    """One microbatch through one layer, without recomputation.

    Args:
        run: the run's configuration, in a layout.
        speed: GPU and rates.
        fp8: whether the layer's matrix products run in FP8.
    """
    measured = _measured_flops(speed.rates, fp8=fp8)
    if measured is not None:
        flops = model_flops_per_sequence(run.model)
        of_layers = flops.total - flops.readout
        return _thirds(run, of_layers / run.model.num_layers / measured)
    tokens = tokens_on_rank(run)
    products = inputs = gradients = 0.0
    for inner, columns in _shapes(run):
        products += speed.product(tokens, inner, columns, fp8=fp8)
        # Weights are cast once a step, see prediction.py.
        inputs += speed.cast(tokens * inner) if fp8 else 0.0
        gradients += speed.cast(tokens * columns) if fp8 else 0.0
    attention = _attention(run, speed)
    rest = speed.moved(_BF16_BYTES * tokens * _elementwise(run))
    rest += _KERNELS * speed.rates.launch_seconds
    return Seconds(
        forward=products + inputs + attention.forward + rest,
        backward=2 * (products + rest) + gradients + attention.backward,
    )


def tokens_on_rank(run: RunConfig) -> float:
    """T: tokens of a microbatch on one context-parallel rank."""
    tokens = run.model.seq_length * run.training.micro_batch_size
    return tokens / run.parallel.context_parallel_size


def _shapes(run: RunConfig) -> list[tuple[float, float]]:
    """(inner, columns) of the layer's four products on a rank."""
    model, tensor = run.model, run.parallel.tensor_model_parallel_size
    hidden, queries = model.hidden_size, model.num_attention_heads * model.head_dim
    keys = model.query_groups * model.head_dim
    wide = model.ffn_width * (2 if model.activation is Activation.SWIGLU else 1)
    return [
        (hidden, (queries + 2 * keys) / tensor),
        (queries / tensor, hidden),
        (hidden, wide / tensor),
        (model.ffn_width / tensor, hidden),
    ]


def _elementwise(run: RunConfig) -> float:
    """Elements of a token that a layer's forward pass reads and writes beside products."""
    model, tensor = run.model, run.parallel.tensor_model_parallel_size
    share = 1 / tensor if run.parallel.sequence_parallel else 1.0
    # Two norms, a read and a write each; two residual sums, two reads and a write each.
    stream = (2 * 2 + 2 * 3) * model.hidden_size * share
    rotated = 2 * (model.num_attention_heads + model.query_groups) * model.head_dim / tensor
    return stream + rotated + _ACTIVATION_PASSES[model.activation] * model.ffn_width / tensor


def _attention(run: RunConfig, speed: Speed) -> Seconds:
    """Scores and context: the causal half in a fused kernel, all of it in the unfused one."""
    model, tensor = run.model, run.parallel.tensor_model_parallel_size
    tokens, queries = tokens_on_rank(run), model.num_attention_heads * model.head_dim / tensor
    rate = speed.rates.attention_efficiency * speed.gpu.peak_flops(fp8=False)
    causal_half = 2 * tokens * model.seq_length * queries / rate
    if not has_unfused_attention(run):
        return Seconds(forward=causal_half, backward=_ATTENTION_BACKWARD * causal_half)
    heads = model.num_attention_heads / tensor
    scores = speed.moved(_SCORE_BYTES * tokens * model.seq_length * heads)
    return Seconds(forward=2 * causal_half + scores, backward=2 * (2 * causal_half + scores))


def _readout(run: RunConfig, speed: Speed) -> Seconds:
    """Logits and loss; never in FP8."""
    measured = _measured_flops(speed.rates, fp8=False)
    if measured is not None:
        return _thirds(run, model_flops_per_sequence(run.model).readout / measured)
    rows = run.model.padded_vocab_size / run.parallel.tensor_model_parallel_size
    product = speed.product(tokens_on_rank(run), run.model.hidden_size, rows, fp8=False)
    loss = speed.moved(_LOGIT_BYTES * tokens_on_rank(run) * rows)
    return Seconds(forward=product + loss / 2, backward=2 * product + loss / 2)


def _again(run: RunConfig, position: int, speed: Speed, *, fp8: bool) -> float:
    """Seconds that recomputing a layer costs; position counts from its chunk's first layer."""
    recompute = run.recompute
    if recompute.recompute_granularity is RecomputeGranularity.SELECTIVE:
        return _attention(run, speed).forward
    if recompute.recompute_granularity is not RecomputeGranularity.FULL:
        return 0.0
    block = recompute.recompute_method is RecomputeMethod.BLOCK
    kept = block and position >= (recompute.recompute_num_layers or 0)
    return 0.0 if kept else layer_seconds(run, speed, fp8=fp8).forward


def _measured_flops(rates: Rates, *, fp8: bool) -> float | None:
    """Model FLOP/s of one GPU alone, if they were measured."""
    measured = rates.compute_tflops_fp8 if fp8 else rates.compute_tflops_bf16
    # What is not known is nan, the one number that differs from itself.
    return measured * 1e12 if measured == measured else None


def _thirds(run: RunConfig, seconds_per_sequence: float) -> Seconds:
    """A sequence's seconds for a microbatch on one rank: a third forward, the rest backward."""
    parallel = run.parallel
    ranks = parallel.tensor_model_parallel_size * parallel.context_parallel_size
    seconds = run.training.micro_batch_size * seconds_per_sequence / ranks
    return Seconds(forward=seconds / 3, backward=2 * seconds / 3)
