"""Memory of one rank, estimated from the configuration and the parameters that the rank holds.

Weights, gradients and optimizer state are counted element by element:

==================  ======================================================================
weights             4 bytes (fp32) or 2 (bf16); matrices computed in FP8: 4 (bf16, FP8, FP8
                    transposed), or 2 with ``fp8_param_gather``, which drops the bf16 one
gradients           4: buffers are fp32 whatever the precision, never sharded
optimizer           AdamW 8, Lion 4, Muon 4 for hidden matrices and AdamW's 8 for the others; plus
                    4 of fp32 main weights with bf16; divided by data x context parallel size with
                    the distributed optimizer
==================  ======================================================================

Activations follow arXiv:2205.05198 (Korthikanti et al.), Section 4, for this architecture: no
dropout, fused attention (no S x S scores), what each operation keeps for its backward pass. With
e bytes per element (2 or 4), T = S B / CP tokens of a microbatch, t tensor-parallel ranks, r = 1/t
with sequence parallelism and 1 without, a layer keeps::

    T e [ 4 M r + (H + 2 G) D / t + (H + G) D / t + H D / t + a F / t ]

which are input and output of both norms; query, key and value as the projection leaves them;
query and key rotated; attention's output; and a FFN tensors: 1 (relu), 2 (squared relu, gelu) or 5
(swiglu). A scalar gain keeps 2 M r more. Unfused attention adds probabilities, S B H S / (t CP)
elements of 4 bytes (6 with bf16). Inputs of FP8 matrix products are kept in 1 byte beside what
their producers keep. The schedule says how many microbatches a rank holds at a time.

These are estimates. What autograd keeps of a layer on a CPU in fp32 agrees within 1%; with bf16 or
a vector gain a layer keeps an eighth more there, because the CPU's norm is not one kernel. They
leave out workspaces, gathered copies, communication buffers, fragmentation and the CUDA context.
Must not import torch or megatron.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_mup.config import (
    Activation,
    AttentionBackend,
    OptimizerName,
    RecomputeGranularity,
    RecomputeMethod,
    RunConfig,
    TransformerImpl,
)
from megatron_mup.parameterization.roles import NormGain, Role

GIB = 2**30

NOT_IN_LAYERS = (Role.EMBEDDING, Role.UNEMBEDDING, Role.GAIN, Role.BIAS)
"""Roles of what is no weight matrix of a layer: never in FP8, and AdamW's under Muon."""

_FFN_TENSORS = {
    Activation.RELU: 1,
    Activation.SQUARED_RELU: 2,
    Activation.GELU: 2,
    Activation.SWIGLU: 5,
}
"""Tensors of width F that the FFN keeps. Relu's output is also its derivative's mask; a gated FFN
keeps both halves, the gate's nonlinearity, the up half plus upstream's offset of 0, the product."""


@dataclass(frozen=True, kw_only=True)
class ChunkContents:
    """What one model chunk of a rank holds.

    Attributes:
        layers: numbers of its layers, from 0 over all stages.
        matrix_elements: elements of the layers' weight matrices on this rank.
        other_elements: elements of embedding, readout, gains and biases on this rank.
        readout: whether it ends in the readout and the loss.
    """

    layers: tuple[int, ...]
    matrix_elements: int
    other_elements: int
    readout: bool

    @property
    def elements(self) -> int:
        """Trainable elements on this rank."""
        return self.matrix_elements + self.other_elements


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one rank by what they are for.

    Attributes:
        weights: parameters, with the FP8 copies of those computed in FP8.
        gradients: fp32 buffers.
        optimizer: moments and main weights.
        layers: activations that layers keep.
        recomputed: what recomputation holds beyond them for a while.
        logits: final norm, logits and softmax of one microbatch; gone before layers recompute.
    """

    weights: float
    gradients: float
    optimizer: float
    layers: float
    recomputed: float
    logits: float

    @property
    def activations(self) -> float:
        """At their peak."""
        return self.layers + max(self.recomputed, self.logits)

    @property
    def total(self) -> float:
        """All of them."""
        return self.weights + self.gradients + self.optimizer + self.activations


def rank_memory(
    run: RunConfig,
    chunks: Sequence[ChunkContents],
    *,
    stage: int,
    data_parallel_size: int,
) -> Memory:
    """Memory of a rank of one pipeline stage.

    Args:
        run: the run's configuration.
        chunks: its model chunks, as built.
        stage: pipeline rank, from 0.
        data_parallel_size: ranks with the same parameters and other sequences.

    Returns:
        Estimated bytes at the peak of a step.
    """
    shards = 1
    if run.parallel.use_distributed_optimizer:
        shards = data_parallel_size * run.parallel.context_parallel_size
    matrices = sum(chunk.matrix_elements for chunk in chunks)
    others = sum(chunk.other_elements for chunk in chunks)
    microbatches = run.training.global_batch_size // (
        run.training.micro_batch_size * data_parallel_size
    )
    kept, recomputed = _layer_activations(run, chunks, stage=stage, microbatches=microbatches)
    return Memory(
        weights=sum(_weight_bytes(run, chunk) for chunk in chunks),
        gradients=4.0 * (matrices + others),
        optimizer=optimizer_bytes(run, matrices, others) / shards,
        layers=kept,
        recomputed=recomputed,
        # The last chunk's loss is differentiated at once: one microbatch's logits at a time.
        logits=sum(_readout_bytes(run) for chunk in chunks if chunk.readout),
    )


def checkpoint_bytes(run: RunConfig, matrices: int, others: int) -> int:
    """Size of a checkpoint: weights, fp32 main weights where they differ, optimizer state.

    Args:
        run: the run's configuration.
        matrices: elements of the layers' weight matrices, all ranks together.
        others: elements of embedding, readout, gains and biases.

    Returns:
        Bytes over all files.
    """
    return _element_bytes(run) * (matrices + others) + optimizer_bytes(run, matrices, others)


def layer_activation_bytes(run: RunConfig, *, fp8: bool = False) -> float:
    """What one layer keeps of one microbatch on one rank, without recomputation.

    Args:
        run: the run's configuration.
        fp8: whether this layer's matrix products run in FP8.

    Returns:
        Estimated bytes; the formula stands at the top of this file.
    """
    model, tensor = run.model, run.parallel.tensor_model_parallel_size
    size, tokens = _element_bytes(run), _tokens(run)
    queries, keys = model.num_attention_heads * model.head_dim, model.query_groups * model.head_dim
    stream = model.hidden_size * _stream_share(run)
    ffn = _FFN_TENSORS[model.activation] * model.ffn_width
    scaled = 2 * stream if model.norm_gain is NormGain.SCALAR else 0.0
    attention = (queries + 2 * keys) + (queries + keys) + queries
    # In FP8 the linear layers keep their own 1-byte inputs. Of the wide ones, attention's output
    # stays for its own sake, and relu's; the norms' outputs and other FFN outputs go.
    if fp8:
        if model.activation is not Activation.RELU:
            ffn -= model.ffn_width
        wide = 2 * stream + scaled + (attention + ffn) / tensor
        narrow = 2 * stream + (queries + model.ffn_width) / tensor
    else:
        wide, narrow = 4 * stream + scaled + (attention + ffn) / tensor, 0.0
    return tokens * (size * wide + narrow) + _score_bytes(run)


def has_unfused_attention(run: RunConfig) -> bool:
    """Whether attention keeps its S x S scores: Megatron's own core attention does."""
    local = run.model.transformer_impl is TransformerImpl.LOCAL
    return local and run.model.attention_backend is AttentionBackend.LOCAL


def _score_bytes(run: RunConfig) -> float:
    """Attention probabilities of one layer; none with a fused kernel, or when recomputed."""
    model = run.model
    selective = run.recompute.recompute_granularity is RecomputeGranularity.SELECTIVE
    if selective or not has_unfused_attention(run):
        return 0.0
    heads = model.num_attention_heads / run.parallel.tensor_model_parallel_size
    # The softmax is taken in fp32; with bf16 its rounded copy is kept as well.
    per_element = 6 if run.precision.bf16 else 4
    return per_element * _tokens(run) * heads * model.seq_length


def _element_bytes(run: RunConfig) -> int:
    return 2 if run.precision.bf16 else 4


def _tokens(run: RunConfig) -> float:
    """T: tokens of one microbatch on one rank, before sequence parallelism."""
    tokens = run.model.seq_length * run.training.micro_batch_size
    return tokens / run.parallel.context_parallel_size


def _stream_share(run: RunConfig) -> float:
    """R: the part of norms and residual stream that a tensor-parallel rank holds."""
    if not run.parallel.sequence_parallel:
        return 1.0
    return 1.0 / run.parallel.tensor_model_parallel_size


def runs_in_fp8(run: RunConfig, layer: int) -> bool:
    """Whether a layer (from 0, over all stages) computes its matrix products in FP8."""
    precision = run.precision
    if precision.fp8_format is None or not precision.first_last_layers_bf16:
        return precision.fp8_format is not None
    end = run.model.num_layers - precision.num_layers_at_end_in_bf16
    return precision.num_layers_at_start_in_bf16 <= layer < end


def _weight_bytes(run: RunConfig, chunk: ChunkContents) -> float:
    size = _element_bytes(run)
    in_fp8 = sum(runs_in_fp8(run, layer) for layer in chunk.layers)
    share = in_fp8 / len(chunk.layers) if chunk.layers else 0.0
    # TransformerEngine keeps an FP8 weight and its transpose for the backward pass (assumption:
    # the layout of Hopper); other architectures may need the first alone.
    fp8_size = 2 if run.precision.fp8_param_gather else size + 2
    matrices = chunk.matrix_elements * (share * fp8_size + (1 - share) * size)
    return matrices + chunk.other_elements * size


def optimizer_bytes(run: RunConfig, matrices: int, others: int) -> int:
    """Bytes of moments and fp32 main weights, unsharded.

    Args:
        run: the run's configuration.
        matrices: elements of the layers' weight matrices.
        others: elements of embedding, readout, gains and biases.
    """
    name = run.optimizer.optimizer
    of_matrices, of_others = {
        OptimizerName.ADAM: (8, 8),
        OptimizerName.LION: (4, 4),
        OptimizerName.MUON: (4, 8),
    }[name]
    main = 4 if run.precision.bf16 else 0
    return (of_matrices + main) * matrices + (of_others + main) * others


def _layer_activations(
    run: RunConfig, chunks: Sequence[ChunkContents], *, stage: int, microbatches: int
) -> tuple[float, float]:
    """What the layers of a rank keep, and what recomputing adds for a while."""
    by_chunk = [_chunk_activations(run, chunk) for chunk in chunks]
    kept = sum(of_chunk for of_chunk, _ in by_chunk)
    passes = passes_in_flight(run, stage, microbatches)
    return kept * passes / len(chunks), max(again for _, again in by_chunk)


def _chunk_activations(run: RunConfig, chunk: ChunkContents) -> tuple[float, float]:
    """What a chunk keeps of one microbatch, and what recomputing it adds for a while."""
    layers = [layer_activation_bytes(run, fp8=runs_in_fp8(run, layer)) for layer in chunk.layers]
    if run.recompute.recompute_granularity is not RecomputeGranularity.FULL or not layers:
        return sum(layers), 0.0
    count = min(run.recompute.recompute_num_layers or 1, len(layers))
    stream = _tokens(run) * _element_bytes(run) * run.model.hidden_size * _stream_share(run)
    if run.recompute.recompute_method is RecomputeMethod.BLOCK:
        # The last layers, kept whole, have had their backward pass when the first ones recompute.
        whole = sum(layers[count:])
        return count * stream + whole, max(0.0, max(layers[:count]) - whole)
    groups = -(-len(layers) // count)
    return groups * stream, max(sum(layers[i : i + count]) for i in range(0, len(layers), count))


def _readout_bytes(run: RunConfig) -> float:
    """Final norm, logits in the model's precision and softmax in fp32, of one microbatch."""
    stream = 2 * run.model.hidden_size * _stream_share(run)
    vocabulary = run.model.padded_vocab_size / run.parallel.tensor_model_parallel_size
    # In fp32 the softmax overwrites the logits.
    per_logit = 4 + 2 if run.precision.bf16 else 4
    return _tokens(run) * (_element_bytes(run) * stream + per_logit * vocabulary)


def workspace_bytes(run: RunConfig, *, readout: bool) -> float:
    """Tensors that live for a moment on top of what is kept: ours, an assumption.

    While a layer's backward pass works: gradients of two FFN activations and of two residual
    streams, and the gradient of the largest weight matrix before it joins its fp32 buffer (fused
    accumulation is off); with sequence parallelism, two gathered streams. At the readout the
    same of the logits and of their matrix. The larger of both.

    Args:
        run: the run's configuration.
        readout: whether the rank ends in the readout.

    Returns:
        Bytes of one rank.
    """
    model, tensor = run.model, run.parallel.tensor_model_parallel_size
    streams = 2 * (1 + _stream_share(run)) if run.parallel.sequence_parallel else 2
    wide = model.ffn_width * (2 if model.activation is Activation.SWIGLU else 1)
    matrix = model.hidden_size * max(wide, model.num_attention_heads * model.head_dim)
    layer = _tokens(run) * (2 * wide / tensor + streams * model.hidden_size) + matrix / tensor
    logits = 0.0
    if readout:
        rows = model.padded_vocab_size / tensor
        logits = (_tokens(run) + model.hidden_size) * rows
    return _element_bytes(run) * max(layer, logits)


def passes_in_flight(run: RunConfig, stage: int, microbatches: int) -> int:
    """Forward passes of model chunks whose activations a rank holds at its peak.

    Without virtual stages the 1F1B schedule holds P - p microbatches on stage p of P; the
    interleaved one 2 (P - p - 1) + (v - 1) P + 1 passes through its v chunks (upstream's
    ``get_pp_rank_microbatches``, 0.19.2: warmup passes, and the one in work).

    Args:
        run: the run's configuration.
        stage: p, from 0.
        microbatches: of one step on one rank.
    """
    stages, chunks = run.parallel.pipeline_model_parallel_size, run.parallel.model_chunks
    if stages == 1:
        return 1
    if run.parallel.virtual_stages is None:
        return min(stages - stage, microbatches)
    return min(2 * (stages - stage - 1) + (chunks - 1) * stages + 1, chunks * microbatches)


def bubble_fraction(run: RunConfig, microbatches: int) -> float:
    """Share of a step that a pipeline stage waits: (P - 1) / (v n + P - 1), arXiv:2104.04473.

    Args:
        run: the run's configuration.
        microbatches: n, of one step on one rank.
    """
    idle = run.parallel.pipeline_model_parallel_size - 1
    return idle / (run.parallel.model_chunks * microbatches + idle)
