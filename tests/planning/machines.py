"""GPUs and rates of round numbers, so that seconds can be computed by hand."""

from __future__ import annotations

import dataclasses
import math

from megatron_mup.config import RunConfig
from megatron_mup.planning.assumptions import Rates
from megatron_mup.planning.communication import Links
from megatron_mup.planning.compute import Speed
from megatron_mup.planning.gpus import GPUS, Gpu, GpuName
from tests.configurations import tiny

H100: Gpu = GPUS[GpuName.H100]
PERFECT = Rates(
    matrix_efficiency_bf16=1.0,
    matrix_efficiency_fp8=1.0,
    attention_efficiency=1.0,
    memory_efficiency=1.0,
    launch_seconds=0.0,
    nvlink_efficiency=1.0,
    network_gigabytes_per_second=50.0,
    collective_seconds=0.0,
    overlap=1.0,
    compute_tflops_bf16=math.nan,
    compute_tflops_fp8=math.nan,
    reserve=0.0,
    context_gigabytes=0.0,
    gpus_per_node=8,
)
"""The data sheet reached everywhere, and every transfer hidden that can be."""


def rates(**changes: float) -> Rates:
    """Perfect rates but for some."""
    return dataclasses.replace(PERFECT, **changes)


def links(gpus: int, **changes: float) -> Links:
    """Connections of so many H100."""
    return Links(speed=Speed(gpu=H100, rates=rates(**changes)), gpus=gpus)


def planned(*options: str) -> RunConfig:
    """The tiny run as a plan needs it: bf16 with TransformerEngine."""
    return tiny("bf16=true", "transformer_impl=transformer_engine", *options)
