"""Typed configuration of a run: frozen dataclasses, one per concern, Megatron's option names.

Each section checks its own values at construction; what involves several sections is checked by
``RunConfig.__post_init__``, so an invalid run never exists. Derived values are properties. Reading
YAML and the command line is ``config_io``'s task. Must not import torch or megatron.
"""

from megatron_mup.config.choices import (
    Activation,
    AmaxAlgorithm,
    AttentionBackend,
    BadStepPolicy,
    DecayStyle,
    ExtraWarmup,
    ExtraWarmupRoles,
    Fp8Format,
    Fp8Recipe,
    LossDenominator,
    MuonTpMode,
    OptimizerName,
    RecomputeGranularity,
    RecomputeMethod,
    SampleLayout,
    TransformerImpl,
    WsdDecayStyle,
)
from megatron_mup.config.layout import ParallelConfig, PrecisionConfig, RecomputeConfig
from megatron_mup.config.model import ModelConfig
from megatron_mup.config.optimization import OptimizerSection, ScheduleConfig
from megatron_mup.config.run import RunConfig
from megatron_mup.config.running import DataConfig, LoggingConfig, TrainingConfig
from megatron_mup.config.survival import CheckpointConfig, FaultConfig

__all__ = [
    "Activation",
    "AmaxAlgorithm",
    "AttentionBackend",
    "BadStepPolicy",
    "CheckpointConfig",
    "DataConfig",
    "DecayStyle",
    "ExtraWarmup",
    "ExtraWarmupRoles",
    "FaultConfig",
    "Fp8Format",
    "Fp8Recipe",
    "LoggingConfig",
    "LossDenominator",
    "ModelConfig",
    "MuonTpMode",
    "OptimizerName",
    "OptimizerSection",
    "ParallelConfig",
    "PrecisionConfig",
    "RecomputeConfig",
    "RecomputeGranularity",
    "RecomputeMethod",
    "RunConfig",
    "SampleLayout",
    "ScheduleConfig",
    "TrainingConfig",
    "TransformerImpl",
    "WsdDecayStyle",
]
