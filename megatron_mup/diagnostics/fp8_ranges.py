"""How much of FP8's range the tensors of linear layers use: amax, underflow, saturation.

Watches every N-th step of a run, through hooks that change nothing: the input, the weight and the
output's gradient of each linear layer of the first microbatch, as FP8 sees them. Query, key and
value are one matrix with one scale, so they stand together. The scale is the one that
TransformerEngine holds (``fp8_meta``, delayed scaling), or what current scaling makes of the tensor
itself; without FP8 the latter says what FP8 would do. Inputs of TransformerEngine's layers that
contain the norm are normalized here first. On one rank; blockwise scales are not computed.

Formats: OCP 8-bit floating point (arXiv:2209.05433, Table 1).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

from megatron_mup.config import Fp8Format, Fp8Recipe, RunConfig
from megatron_mup.errors import ConfigError
from megatron_mup.training.state import TrainState


@dataclass(frozen=True)
class NumberFormat:
    """An 8-bit format.

    Attributes:
        largest: finite value.
        smallest: positive value, subnormal.
    """

    largest: float
    smallest: float


E4M3 = NumberFormat(largest=448.0, smallest=2.0**-9)
E5M2 = NumberFormat(largest=57344.0, smallest=2.0**-16)


class Kind(StrEnum):
    """Which tensor of a linear layer."""

    INPUT = "input"
    WEIGHT = "weight"
    GRADIENT = "gradient"


@dataclass(frozen=True)
class Fp8Range:
    """One tensor in FP8.

    Attributes:
        amax: largest magnitude before scaling.
        underflow: share of its nonzero elements that become zero.
        saturation: share of its elements beyond the largest value.
    """

    amax: float
    underflow: float
    saturation: float


@dataclass(frozen=True)
class Fp8Record:
    """A measured tensor.

    Attributes:
        iteration: the step's number, from 1.
        layer: from 1.
        matrix: "qkv", "attention_out", "ffn_in" or "ffn_out".
        kind: of the tensor.
        range: what was found.
    """

    iteration: int
    layer: int
    matrix: str
    kind: Kind
    range: Fp8Range


_MATRICES = {
    "self_attention.linear_qkv": "qkv",
    "self_attention.linear_proj": "attention_out",
    "mlp.linear_fc1": "ffn_in",
    "mlp.linear_fc2": "ffn_out",
}
_LINEAR = re.compile(rf"^decoder\.layers\.\d+\.({'|'.join(map(re.escape, _MATRICES))})$")

# Places in TransformerEngine's fp8_meta of a layer with one product (module/base.py, 2.20).
_PLACES = {
    Kind.INPUT: ("scaling_fwd", 0),
    Kind.WEIGHT: ("scaling_fwd", 1),
    Kind.GRADIENT: ("scaling_bwd", 0),
}


def fp8_range(
    tensor: Tensor, number_format: NumberFormat, *, scale: float | None = None
) -> Fp8Range:
    """What becomes of a tensor's elements in FP8.

    Args:
        tensor: any shape and floating dtype.
        number_format: E4M3 or E5M2.
        scale: factor before the cast; None: the largest element becomes the largest value.
    """
    magnitude = tensor.detach().float().abs()
    amax = float(magnitude.max())
    if scale is None:
        scale = number_format.largest / amax if amax > 0 else 1.0
    scaled, nonzero = magnitude * scale, magnitude > 0
    # Half of the smallest value is a tie, which goes to the even neighbour, zero.
    lost = nonzero & (scaled <= number_format.smallest / 2)
    # A little more than the largest is the rounding of the product with the scale.
    beyond = scaled > number_format.largest * (1 + 2.0**-20)
    return Fp8Range(
        amax=amax,
        underflow=float(lost.sum() / nonzero.sum().clamp(min=1)),
        saturation=float(beyond.float().mean()),
    )


def meta_scale(module: torch.nn.Module, kind: Kind) -> float | None:
    """The scale that a TransformerEngine layer holds for a tensor; None if it holds none."""
    direction, place = _PLACES[kind]
    state = getattr(module, "fp8_meta", {}).get(direction)
    # Only delayed scaling has scales between steps.
    scales = getattr(state, "scale", None)
    return None if scales is None else float(scales[place])


class Fp8Ranges:
    """Observer of a training run; give it to ``train(run, observer=...)``.

    Args:
        run: the run's configuration.
        interval: measure every so many steps.

    Raises:
        ConfigError: a recipe whose scales are not per tensor, or a model in parts.
    """

    def __init__(self, run: RunConfig, *, interval: int) -> None:
        precision = run.precision
        if precision.fp8_format is not None and precision.fp8_recipe is Fp8Recipe.BLOCKWISE:
            raise ConfigError(
                "FP8 ranges are measured with one scale per tensor, but precision.fp8_recipe is "
                "blockwise; use delayed or tensorwise"
            )
        if run.parallel.model_parallel_size > 1:
            raise ConfigError(
                f"FP8 ranges are measured on one rank, but the model is spread over "
                f"{run.parallel.model_parallel_size}; set the sizes of parallel to 1"
            )
        self.records: list[Fp8Record] = []
        self._interval = interval
        only_e4m3 = precision.fp8_format is Fp8Format.E4M3
        self._gradient_format = E4M3 if only_e4m3 else E5M2
        self._found: dict[tuple[int, str, Kind], Fp8Range] = {}

    @contextmanager
    def opened(self, state: TrainState) -> Iterator[None]:
        """Nothing to open."""
        yield

    def due(self, iteration: int) -> bool:
        """Whether the step that ends as number ``iteration`` is measured."""
        return iteration % self._interval == 0

    @contextmanager
    def forward(self, state: TrainState) -> Iterator[None]:
        """Measure the first microbatch that passes inside, forward and backward."""
        self._found = {}
        with ExitStack() as hooks:
            for layer, matrix, module in linear_layers(state.model_chunks[0]):
                before, after = self._hooks(layer, matrix)
                hooks.callback(module.register_forward_pre_hook(before).remove)
                hooks.callback(module.register_forward_hook(after).remove)
            yield

    def _hooks(self, layer: int, matrix: str) -> tuple[Callable[..., None], Callable[..., None]]:
        def before(module: Any, inputs: tuple[Tensor, ...]) -> None:
            if (layer, matrix, Kind.INPUT) not in self._found:
                self._keep(module, layer, matrix, Kind.INPUT, linear_input(module, inputs[0]))
                self._keep(module, layer, matrix, Kind.WEIGHT, _plain(module.weight))

        def after(module: Any, _inputs: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            if tensor.requires_grad and (layer, matrix, Kind.GRADIENT) not in self._found:
                tensor.register_hook(
                    lambda gradient: self._keep(module, layer, matrix, Kind.GRADIENT, gradient)
                )

        return before, after

    def _keep(self, module: Any, layer: int, matrix: str, kind: Kind, tensor: Tensor) -> None:
        number_format = self._gradient_format if kind is Kind.GRADIENT else E4M3
        # Later microbatches register their hooks before the first one's gradient has come.
        self._found.setdefault(
            (layer, matrix, kind),
            fp8_range(tensor, number_format, scale=meta_scale(module, kind)),
        )

    @contextmanager
    def update(self, state: TrainState) -> Iterator[None]:
        """The update is not looked at."""
        yield

    def report(self, iteration: int) -> dict[str, float]:
        """Take what was found into ``records``; worst underflow and saturation as metrics."""
        self.records += [
            Fp8Record(iteration, *place, found) for place, found in self._found.items()
        ]
        if not self._found:
            return {}
        return {
            "fp8-underflow-max": max(found.underflow for found in self._found.values()),
            "fp8-saturation-max": max(found.saturation for found in self._found.values()),
        }


def linear_layers(gpt: torch.nn.Module) -> Iterator[tuple[int, str, torch.nn.Module]]:
    """Layer number from 1, matrix and module of each linear layer of a GPTModel."""
    for name, module in gpt.named_modules():
        match = _LINEAR.match(name)
        if match is not None:
            yield int(name.split(".")[2]) + 1, _MATRICES[match.group(1)], module


def linear_input(module: Any, inputs: Tensor) -> Tensor:
    """What a layer multiplies: its inputs, normalized if the layer contains the norm."""
    gain = getattr(module, "layer_norm_weight", None)
    if gain is None:
        return inputs
    with torch.no_grad():
        return functional.rms_norm(inputs, inputs.shape[-1:], gain, module.eps)


def _plain(weight: Any) -> Tensor:
    """A weight's values; those kept in FP8 as what they stand for."""
    plain: Tensor = weight.dequantize() if hasattr(weight, "_quantizer") else weight
    return plain


def worst_by_matrix(records: list[Fp8Record]) -> dict[tuple[str, Kind], Fp8Range]:
    """Largest amax, underflow and saturation over layers and steps, by matrix and kind."""
    groups: dict[tuple[str, Kind], list[Fp8Range]] = defaultdict(list)
    for record in records:
        groups[record.matrix, record.kind].append(record.range)
    return {
        key: Fp8Range(
            amax=max(found.amax for found in ranges),
            underflow=max(found.underflow for found in ranges),
            saturation=max(found.saturation for found in ranges),
        )
        for key, ranges in groups.items()
    }
