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
    """Supported optimizers, Megatron's spelling; ``adam`` is AdamW."""

    ADAM = "adam"
    LION = "lion"


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


class LossDenominator(StrEnum):
    """What the summed loss is divided by before differentiation.

    ``tokens``: the batch's unmasked tokens (Megatron). ``positions``: all positions, padding
    included (the code of arXiv:2404.05728); the reported loss is per unmasked token in both cases.
    """

    TOKENS = "tokens"
    POSITIONS = "positions"
