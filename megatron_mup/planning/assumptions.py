"""Every number of a plan that is not counted: slow and fast end, unit, source; and calibration.

A share is of the data sheet's figure. What nobody measured on the user's machine stays an interval
and carries through to the plan's step time. ``--calibration`` replaces ends by measured numbers.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_mup.errors import ConfigError
from megatron_mup.planning.gpus import GpuName


@dataclass(frozen=True, kw_only=True)
class Assumption:
    """One number that a plan rests on.

    Attributes:
        slow: value that makes a run longest.
        fast: value that makes it shortest.
        unit: of both.
        source: where it comes from.
    """

    slow: float
    fast: float
    unit: str
    source: str

    @property
    def known(self) -> bool:
        """Whether there is a value."""
        return not math.isnan(self.slow)


_OURS = "assumption (ours)"
_MEASURED_ONLY = "not measured; see --calibration"

DEFAULTS: dict[str, Assumption] = {
    "matrix_efficiency_bf16": Assumption(
        slow=0.50,
        fast=0.75,
        unit="share of the dense peak that large products reach",
        source=f"{_OURS}: set so that published runs lie inside, see docs/plan.md",
    ),
    "matrix_efficiency_fp8": Assumption(
        slow=0.30,
        fast=0.65,
        unit="share of the dense peak that large products reach, casts apart",
        source=f"{_OURS}: set so that published runs lie inside, see docs/plan.md",
    ),
    "attention_efficiency": Assumption(
        slow=0.30,
        fast=0.60,
        unit="share of the dense bf16 peak, causal half",
        source=f"{_OURS}: arXiv:2407.08608 reports up to 0.75 forward on H100",
    ),
    "memory_efficiency": Assumption(
        slow=0.60,
        fast=0.85,
        unit="share of memory bandwidth of everything that is no matrix product",
        source=_OURS,
    ),
    "launch_seconds": Assumption(
        slow=4e-6,
        fast=1e-6,
        unit="seconds for each kernel beside its work",
        source=_OURS,
    ),
    "nvlink_efficiency": Assumption(
        slow=0.50,
        fast=0.85,
        unit="share of one direction's bandwidth in collectives",
        source=_OURS,
    ),
    "network_gigabytes_per_second": Assumption(
        slow=30.0,
        fast=45.0,
        unit="GB/s of each GPU in one direction, in collectives",
        source=f"{_OURS}: one 400 Gb/s adapter for each GPU, as in DGX H100 and B200",
    ),
    "collective_seconds": Assumption(
        slow=3e-5,
        fast=1e-5,
        unit="seconds for each collective or transfer beside its bytes",
        source=_OURS,
    ),
    "overlap": Assumption(
        slow=0.5,
        fast=0.9,
        unit="share of a transfer that is hidden where the schedule can hide it",
        source=_OURS,
    ),
    "compute_tflops_bf16": Assumption(
        slow=math.nan,
        fast=math.nan,
        unit="model TFLOP/s of one GPU alone, in place of the kernels' estimate",
        source=_MEASURED_ONLY,
    ),
    "compute_tflops_fp8": Assumption(
        slow=math.nan,
        fast=math.nan,
        unit="the same in FP8",
        source=_MEASURED_ONLY,
    ),
    "reserve": Assumption(
        slow=0.10,
        fast=0.10,
        unit="share of the device's memory left free for fragmentation",
        source=_OURS,
    ),
    "context_gigabytes": Assumption(
        slow=2.0,
        fast=2.0,
        unit="GB of CUDA context, NCCL buffers, libraries' workspaces",
        source=_OURS,
    ),
    "gpus_per_node": Assumption(
        slow=8, fast=8, unit="GPUs that NVLink joins", source="HGX and DGX data sheets"
    ),
}
"""What a plan assumes unless a calibration says otherwise."""

_SHARES = (
    "matrix_efficiency_bf16",
    "matrix_efficiency_fp8",
    "attention_efficiency",
    "memory_efficiency",
    "nvlink_efficiency",
)
# Those of which more makes a run longer.
_COSTS = ("launch_seconds", "collective_seconds")
# Those that decide whether a layout fits: one value, no interval.
_SINGLE = ("reserve", "context_gigabytes", "gpus_per_node")


@dataclass(frozen=True, kw_only=True)
class Rates:
    """One end of every assumption; fields are named as in ``DEFAULTS``."""

    matrix_efficiency_bf16: float
    matrix_efficiency_fp8: float
    attention_efficiency: float
    memory_efficiency: float
    launch_seconds: float
    nvlink_efficiency: float
    network_gigabytes_per_second: float
    collective_seconds: float
    overlap: float
    compute_tflops_bf16: float
    compute_tflops_fp8: float
    reserve: float
    context_gigabytes: float
    gpus_per_node: float

    @property
    def node_size(self) -> int:
        """GPUs of one node."""
        return int(self.gpus_per_node)


def ends(assumptions: Mapping[str, Assumption]) -> tuple[Rates, Rates]:
    """The slow and the fast end."""
    slow = {name: assumption.slow for name, assumption in assumptions.items()}
    fast = {name: assumption.fast for name, assumption in assumptions.items()}
    return Rates(**slow), Rates(**fast)


def assumptions_for(gpu: GpuName, calibration: Path | None) -> dict[str, Assumption]:
    """The defaults, with what a calibration measured in their places.

    Args:
        gpu: of the plan.
        calibration: YAML of ``source``, optionally ``gpu``, and names of ``DEFAULTS`` with a
            number or a list of two; None for the defaults.

    Raises:
        ConfigError: unreadable, of another GPU, an unknown name or an impossible value.
    """
    if calibration is None:
        return dict(DEFAULTS)
    found = _read(calibration)
    source = found.pop("source", None)
    if not isinstance(source, str) or not source:
        raise ConfigError(
            f"{calibration}: 'source' is missing; say in a line what was measured where and when"
        )
    of_gpu = found.pop("gpu", gpu.value)
    if str(of_gpu).lower() != gpu.value:
        raise ConfigError(
            f"{calibration} was measured on {of_gpu}, but the plan is for --gpu {gpu}; give the "
            "same GPU or leave --calibration out"
        )
    result = dict(DEFAULTS)
    for name, value in found.items():
        slow, fast = _value(name, value, calibration)
        result[name] = dataclasses.replace(
            _default(name, calibration), slow=slow, fast=fast, source=f"{calibration}: {source}"
        )
    return result


def _read(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read --calibration '{path}': {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"--calibration '{path}' is not valid YAML: {reason}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"--calibration '{path}' must be a mapping of names to numbers")
    return {str(key): value for key, value in data.items()}


def _default(name: str, path: Path) -> Assumption:
    if name not in DEFAULTS:
        near = difflib.get_close_matches(name, DEFAULTS, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"use one of {', '.join(DEFAULTS)}"
        raise ConfigError(f"{path}: unknown name '{name}'; {hint}")
    return DEFAULTS[name]


def _value(name: str, value: Any, path: Path) -> tuple[float, float]:
    """Slow and fast end of what the file gives."""
    _default(name, path)
    numbers = value if isinstance(value, list) else [value]
    whole = all(isinstance(n, int | float) and not isinstance(n, bool) for n in numbers)
    if not whole or len(numbers) not in (1, 2) or (name in _SINGLE and len(numbers) == 2):
        takes = "a number" if name in _SINGLE else "a number or a list of two"
        raise ConfigError(f"{path}: {name} is {value!r}; it takes {takes}")
    ordered = sorted(float(n) for n in numbers)
    for number in ordered:
        _check_range(name, number, path)
    slow, fast = ordered[0], ordered[-1]
    return (fast, slow) if name in _COSTS else (slow, fast)


def _check_range(name: str, number: float, path: Path) -> None:
    positive = math.isfinite(number) and number > 0
    if name in _SHARES:
        valid, rule = positive and number <= 1, "above 0 and at most 1"
    elif name in ("overlap", "reserve"):
        highest = 1.0 if name == "overlap" else 0.9
        valid, rule = 0 <= number <= highest, f"between 0 and {highest:g}"
    elif name == "gpus_per_node":
        valid, rule = positive and number == int(number), "a whole number, at least 1"
    elif name in (*_COSTS, "context_gigabytes"):
        valid, rule = math.isfinite(number) and number >= 0, "0 or more"
    else:
        valid, rule = positive, "above 0"
    if not valid:
        raise ConfigError(f"{path}: {name} is {number:g}; it must be {rule}")
