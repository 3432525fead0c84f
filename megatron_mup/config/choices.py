"""Enumerated options; the values are what YAML and the command line say."""

from __future__ import annotations

from enum import StrEnum


class Activation(StrEnum):
    """FFN nonlinearity; swiglu is gated and has two input matrices."""

    RELU = "relu"
    SQUARED_RELU = "squared_relu"
    GELU = "gelu"
    SWIGLU = "swiglu"


class AttentionBackend(StrEnum):
    """Core attention of the local spec: ``sdpa`` (PyTorch's), ``local`` (Megatron's unfused)."""

    SDPA = "sdpa"
    LOCAL = "local"


class TransformerImpl(StrEnum):
    """Layer spec: Megatron's ``--transformer-impl``."""

    LOCAL = "local"
    TRANSFORMER_ENGINE = "transformer_engine"


class OptimizerName(StrEnum):
    """Supported optimizers, Megatron's spelling; ``adam`` is AdamW.

    ``muon`` orthogonalizes the updates of hidden matrices; AdamW trains the other parameters.
    """

    ADAM = "adam"
    LION = "lion"
    MUON = "muon"


class MuonTpMode(StrEnum):
    """How Muon treats a matrix that is split over tensor-parallel ranks.

    ``duplicated``: every rank gathers and orthogonalizes the whole matrix. ``distributed``: the
    ranks share the work. Megatron's default, ``blockwise``, orthogonalizes each shard alone, so
    its update depends on the layout, and is refused.
    """

    DUPLICATED = "duplicated"
    DISTRIBUTED = "distributed"
    BLOCKWISE = "blockwise"


class Fp8Format(StrEnum):
    """FP8 number format: Megatron's ``--fp8-format``; ``hybrid`` has E5M2 gradients."""

    E4M3 = "e4m3"
    HYBRID = "hybrid"


class Fp8Recipe(StrEnum):
    """How FP8 tensors are scaled: Megatron's ``--fp8-recipe``.

    ``delayed``: from the history of earlier steps; ``tensorwise``: from the current tensor;
    ``blockwise``: one scale per block (Hopper).
    """

    DELAYED = "delayed"
    TENSORWISE = "tensorwise"
    BLOCKWISE = "blockwise"


class AmaxAlgorithm(StrEnum):
    """Delayed scaling: the history's maximum or its last value."""

    MAX = "max"
    MOST_RECENT = "most_recent"


class RecomputeGranularity(StrEnum):
    """Activation recomputation: only the core attention, or whole layers."""

    SELECTIVE = "selective"
    FULL = "full"


class RecomputeMethod(StrEnum):
    """Which layers full recomputation takes: Megatron's ``--recompute-method``."""

    UNIFORM = "uniform"
    BLOCK = "block"


class BadStepPolicy(StrEnum):
    """What happens when a step's loss or gradient is not finite, or its loss spikes.

    ``stop``: the run ends, the batch is saved. ``skip``: the update is left out and counted.
    """

    STOP = "stop"
    SKIP = "skip"


class DecayStyle(StrEnum):
    """Shape of the schedule after warmup."""

    CONSTANT = "constant"
    LINEAR = "linear"
    COSINE = "cosine"
    WSD = "WSD"


class WsdDecayStyle(StrEnum):
    """Shape of WSD's final phase."""

    LINEAR = "linear"
    COSINE = "cosine"
    EXPONENTIAL = "exponential"
    MINUS_SQRT = "minus_sqrt"


class ExtraWarmup(StrEnum):
    """A warmup on top of the linear one, from 1/m to 1, m the width multiplier.

    ``implied_mup``: the one that muP's division of the LR amounts to (arXiv:2510.19093, Eq. 11).
    ``exponential``: m^(t/T - 1) for t < T (ours, after its Eq. 12).
    """

    NONE = "none"
    IMPLIED_MUP = "implied_mup"
    EXPONENTIAL = "exponential"


class ExtraWarmupRoles(StrEnum):
    """``divided``: the matrices whose LR muP would divide. ``all``: every tensor (ours)."""

    DIVIDED = "divided"
    ALL = "all"


class SampleLayout(StrEnum):
    """``packed``: documents concatenated and cut (Megatron). ``document``: one a sequence, padded.

    ``document`` is arXiv:2404.05728's: truncated to the sequence, inputs shifted right behind a
    begin token, loss up to and including the first end of document.
    """

    PACKED = "packed"
    DOCUMENT = "document"


class LossDenominator(StrEnum):
    """What the summed loss is divided by before differentiation.

    ``tokens``: the batch's unmasked tokens (Megatron). ``positions``: all positions, padding
    included (the code of arXiv:2404.05728); the reported loss is per unmasked token in both cases.
    """

    TOKENS = "tokens"
    POSITIONS = "positions"
