"""Typed configuration of a run: frozen dataclasses, one per concern, Megatron's option names.

Each section checks its own values at construction; what involves several sections is checked by
``RunConfig.__post_init__``, so an invalid run never exists. Derived values are properties. Reading
YAML and the command line is ``config_io``'s task. Must not import torch or megatron.
"""

from megatron_mup.config.choices import (
    Activation,
    AttentionBackend,
    DecayStyle,
    LossDenominator,
    OptimizerName,
    TransformerImpl,
    WsdDecayStyle,
)
from megatron_mup.config.model import ModelConfig
from megatron_mup.config.optimization import OptimizerSection, ScheduleConfig
from megatron_mup.config.run import RunConfig
from megatron_mup.config.running import (
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    ParallelConfig,
    TrainingConfig,
)

__all__ = [
    "Activation",
    "AttentionBackend",
    "CheckpointConfig",
    "DataConfig",
    "DecayStyle",
    "LoggingConfig",
    "LossDenominator",
    "ModelConfig",
    "OptimizerName",
    "OptimizerSection",
    "ParallelConfig",
    "RunConfig",
    "ScheduleConfig",
    "TrainingConfig",
    "TransformerImpl",
    "WsdDecayStyle",
]
