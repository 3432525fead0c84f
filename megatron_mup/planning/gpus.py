"""GPUs that a plan knows, from their data sheets. Peaks are those that MFU divides by."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from megatron_mup.errors import ConfigError
from megatron_mup.flops import peak_tflops


class GpuName(StrEnum):
    """What ``--gpu`` takes."""

    H100 = "h100"
    H200 = "h200"
    B200 = "b200"


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU of a node with NVLink.

    Attributes:
        name: as ``--gpu`` takes it.
        memory_gb: 1e9 bytes; the driver reports up to 7% more.
        memory_terabytes_per_second: of the device's memory.
        nvlink_gigabytes_per_second: in one direction, half of what the data sheet gives.
        source: of these three.
    """

    name: GpuName
    memory_gb: float
    memory_terabytes_per_second: float
    nvlink_gigabytes_per_second: float
    source: str

    @property
    def memory_bytes(self) -> float:
        """Memory of the device."""
        return self.memory_gb * 1e9

    def peak_flops(self, *, fp8: bool) -> float:
        """Dense peak, FLOP/s: bfloat16's or FP8's.

        Raises:
            ConfigError: the table of peaks does not have it.
        """
        peak = peak_tflops(self.name.upper(), fp8=fp8)
        if peak is None:
            raise ConfigError(f"--gpu {self.name} has no known peak; use one of {_names()}")
        return peak * 1e12


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            name=GpuName.H100,
            memory_gb=80,
            memory_terabytes_per_second=3.35,
            nvlink_gigabytes_per_second=450,
            source="NVIDIA H100 data sheet, SXM5",
        ),
        Gpu(
            name=GpuName.H200,
            memory_gb=141,
            memory_terabytes_per_second=4.8,
            nvlink_gigabytes_per_second=450,
            source="NVIDIA H200 data sheet, SXM",
        ),
        Gpu(
            name=GpuName.B200,
            memory_gb=180,
            memory_terabytes_per_second=8.0,
            nvlink_gigabytes_per_second=900,
            source="NVIDIA HGX B200 data sheet",
        ),
    )
}


def gpu_called(name: str) -> Gpu:
    """The GPU of a name, in any case.

    Raises:
        ConfigError: it is not known.
    """
    try:
        return GPUS[GpuName(name.lower())]
    except ValueError as error:
        raise ConfigError(
            f"--gpu '{name}' is not known; use one of {_names()}, and --calibration FILE for what "
            "differs"
        ) from error


def _names() -> str:
    return ", ".join(GpuName)
