"""Update dynamics: how far each step moves weights and representations (arXiv:2510.19093).

Watches every N-th step. A forward hook keeps the inputs X of one microbatch, the optimizer's fp32
weights are copied right before the update, and afterwards each logical tensor is measured:
Frobenius norms of W, dW, X, W X and dW X. W is the weight of the step's forward pass.

What a rank adds: every sum of squares is split over tensor- and context-parallel ranks and
pipeline stages so that one sum over all ranks gives the global one. X is the first microbatch of
data-parallel rank 0, which is the same samples for any number of replicas; the others only help to
put sharded weights together. Columns of a sum: see ``_Sum``.

Shape suffixes: T positions of a microbatch, I fan-in, O fan-out, local to a rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from enum import IntEnum
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as functional
from megatron.core import parallel_state, tensor_parallel
from torch import Tensor

from megatron_mup import platform
from megatron_mup.config import RunConfig
from megatron_mup.diagnostics.dynamics_records import (
    DynamicsFile,
    Measured,
    Quantity,
    dynamics_path,
    role_means,
)
from megatron_mup.diagnostics.dynamics_weights import WeightUpdate
from megatron_mup.model.initialization import Shard, part_view
from megatron_mup.model.naming import rows_of_parameters
from megatron_mup.parameterization.roles import Role
from megatron_mup.parameterization.table import ParameterTable, TableRow
from megatron_mup.training.processes import is_log_rank
from megatron_mup.training.state import TrainState

_WITHOUT_PRODUCT = {Role.EMBEDDING, Role.GAIN, Role.BIAS}
"""Roles that are no linear map of a hidden vector: norm, relative update and decay alone."""


class _Sum(IntEnum):
    """Columns of what the ranks add up: squared norms, and the decay with its number of holders."""

    WEIGHT = 0
    UPDATE = 1
    INPUT = 2
    OUTPUT = 3
    OUTPUT_CHANGE = 4
    DECAY = 5
    HOLDERS = 6


def observer_for(run: RunConfig) -> UpdateDynamics | None:
    """What ``train`` is given as its observer.

    Args:
        run: the run's configuration.

    Returns:
        None unless ``logging.diagnostics_interval`` is set.

    Raises:
        ConfigError: there is nowhere to write to.
    """
    return None if run.logging.diagnostics_interval is None else UpdateDynamics(run)


class UpdateDynamics:
    """Measures every ``logging.diagnostics_interval``-th step of a run.

    Args:
        run: the run's configuration, with an interval.

    Raises:
        ConfigError: there is nowhere to write to.
    """

    def __init__(self, run: RunConfig) -> None:
        self._interval = run.logging.diagnostics_interval or 1
        self._path = dynamics_path(run)
        self._file: DynamicsFile | None = None
        self._inputs: dict[int, Tensor] = {}
        self._measured: list[Measured] = []

    @contextmanager
    def opened(self, state: TrainState) -> Iterator[None]:
        """Keep the file open on the first rank; ``state`` has been resumed."""
        if not is_log_rank():
            yield
            return
        self._file = DynamicsFile(self._path, start=state.iteration)
        try:
            yield
        finally:
            self._file.close()

    def due(self, iteration: int) -> bool:
        """Whether the step that ends as number ``iteration``, from 1, is measured."""
        return iteration % self._interval == 0

    @contextmanager
    def forward(self, state: TrainState) -> Iterator[None]:
        """Keep the inputs of every linear layer for the first microbatch that passes inside."""
        self._inputs.clear()
        with ExitStack() as hooks:
            # Other replicas' inputs are not used, and would cost them memory.
            if parallel_state.get_data_parallel_rank() == 0:
                for module, parameter in _linear_layers(state):
                    hook = module.register_forward_hook(self._keeping(parameter))
                    hooks.callback(hook.remove)
            yield

    def _keeping(self, parameter: Tensor) -> Callable[..., None]:
        def keep(_module: Any, inputs: tuple[Tensor, ...], _output: Any) -> None:
            # The first pass alone: others are later microbatches and recomputation.
            if id(parameter) not in self._inputs:
                self._inputs[id(parameter)] = inputs[0].detach()

        return keep

    @contextmanager
    def update(self, state: TrainState) -> Iterator[None]:
        """Measure the update that happens inside; every rank must be here."""
        update = WeightUpdate(state)
        yield
        try:
            self._measured = _results(state.table, _measure(state, update, self._inputs))
        finally:
            self._inputs.clear()

    def report(self, iteration: int) -> dict[str, float]:
        """Write the last measurement, and return its role means, the same on every rank."""
        if self._file is not None:
            self._file.write(iteration, self._measured)
        return role_means(self._measured)


def _tensors(state: TrainState) -> Iterator[tuple[Any, Tensor, tuple[TableRow, ...]]]:
    """Module, parameter and table rows of each logical tensor's holder, in one order everywhere."""
    for chunk in state.model_chunks:
        for local, rows in rows_of_parameters(chunk, state.table).items():
            # The last stage's copy of a tied embedding would count the matrix twice.
            if local == "output_layer.weight" and rows[0].tensor.role is Role.EMBEDDING:
                continue
            module = chunk.get_submodule(local.rpartition(".")[0])
            yield module, chunk.get_parameter(local), rows


def _linear_layers(state: TrainState) -> Iterator[tuple[Any, Tensor]]:
    for module, parameter, rows in _tensors(state):
        if rows[0].tensor.role not in _WITHOUT_PRODUCT:
            yield module, parameter


@torch.no_grad()
def _measure(state: TrainState, update: WeightUpdate, inputs: dict[int, Tensor]) -> Tensor:
    """The sums [tensors of the model, columns of ``_Sum``], float64, over all ranks."""
    place = {row.tensor.name: number for number, row in enumerate(state.table.rows)}
    sums = torch.zeros(len(place), len(_Sum), dtype=torch.float64, device=platform.device())
    shape = state.run.model.shape
    shard = Shard(
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )
    for module, parameter, rows in _tensors(state):
        before, change = update.before_and_change(parameter)
        columns = {_Sum.WEIGHT: before, _Sum.UPDATE: change}
        split = rows[0].tensor.partition_axis is not None
        first = parallel_state.get_tensor_model_parallel_rank() == 0
        counted = {
            column: _first_replica() and _first_context() and (split or first) for column in columns
        }
        layer_input = inputs.get(id(parameter))
        if layer_input is not None:
            layer = _Layer(state, module, layer_input, rows[0].tensor.partition_axis)
            columns |= {_Sum.OUTPUT: layer.times(before), _Sum.OUTPUT_CHANGE: layer.times(change)}
            # Row-parallel products are whole on every rank, the others are split by rows.
            counted |= dict.fromkeys((_Sum.OUTPUT, _Sum.OUTPUT_CHANGE), first or not layer.by_input)
        decay = update.decay(parameter)
        for row in rows:
            target = sums[place[row.tensor.name]]
            for column, values in columns.items():
                if counted[column]:
                    target[column] = _squared_norm(part_view(values, row.tensor.part, shape, shard))
            if layer_input is not None:
                target[_Sum.INPUT] = layer.input_squares
            if decay is not None:
                target[_Sum.DECAY], target[_Sum.HOLDERS] = decay, 1.0
    dist.all_reduce(sums)
    return sums


class _Layer:
    """The inputs of one linear layer, as its weight sees them.

    Args:
        state: for the layout.
        module: Megatron's or TransformerEngine's linear layer.
        kept: its input [S, B, I]; with sequence parallelism a column-parallel layer's is
            [S / TP, B, I].
        axis: which axis of the weight is split, 0 (column-parallel) or 1 (row-parallel).
    """

    def __init__(self, state: TrainState, module: Any, kept: Tensor, axis: int | None) -> None:
        tensor_parallel_size = parallel_state.get_tensor_model_parallel_world_size()
        self.by_input = axis == 1
        inputs = _normed(module, kept)
        squares = _squared_norm(inputs)
        gathered = state.run.parallel.sequence_parallel and tensor_parallel_size > 1
        if gathered and not self.by_input:
            inputs = tensor_parallel.gather_from_sequence_parallel_region(inputs)
        alike = not self.by_input and not gathered
        # Where every tensor-parallel rank has the same inputs, one of them counts.
        counts = not alike or parallel_state.get_tensor_model_parallel_rank() == 0
        self.input_squares = squares if counts else torch.zeros_like(squares)
        self._inputs_TI = inputs.flatten(0, -2)

    def times(self, weight_OI: Tensor) -> Tensor:
        """W X [O, T] with this rank's rows; of a row-parallel layer the sum over ranks."""
        # In the layer's own precision, which on a GPU is the one that costs little.
        product_OT = weight_OI.to(self._inputs_TI.dtype) @ self._inputs_TI.T
        if self.by_input:
            dist.all_reduce(product_OT, group=parallel_state.get_tensor_model_parallel_group())
        return product_OT


def _normed(module: Any, inputs: Tensor) -> Tensor:
    """What reaches the weight: TransformerEngine norms inside of the linear layer."""
    gain = getattr(module, "layer_norm_weight", None)
    if gain is None:
        return inputs
    return functional.rms_norm(inputs, inputs.shape[-1:], gain.to(inputs.dtype), module.eps)


def _squared_norm(values: Tensor) -> Tensor:
    """Sum of squares in float64, without a float64 copy."""
    norm: Tensor = torch.linalg.vector_norm(values, dtype=torch.float64)
    return norm.square()


def _first_replica() -> bool:
    return bool(parallel_state.get_data_parallel_rank() == 0)


def _first_context() -> bool:
    return bool(parallel_state.get_context_parallel_rank() == 0)


def _results(table: ParameterTable, sums: Tensor) -> list[Measured]:
    """The quantities of every tensor of the model."""
    return [
        Measured(row.tensor.name, row.tensor.role.value, _quantities(row, values))
        for row, values in zip(table.rows, sums.tolist(), strict=True)
    ]


def _quantities(row: TableRow, sums: list[float]) -> dict[Quantity, float]:
    """Source: arXiv:2510.19093, section on alignment; see docs/dynamics.md."""
    weight, update, inputs, output, change = (math.sqrt(value) for value in sums[: _Sum.DECAY])
    values = {
        Quantity.WEIGHT_NORM: weight,
        Quantity.RELATIVE_UPDATE: _ratio(update, weight),
        Quantity.EFFECTIVE_DECAY: _ratio(sums[_Sum.DECAY], sums[_Sum.HOLDERS]),
    }
    if row.tensor.role in _WITHOUT_PRODUCT:
        return values
    update_alignment = _ratio(change, update * inputs)
    weight_alignment = _ratio(output, weight * inputs)
    return values | {
        Quantity.UPDATE_ALIGNMENT: update_alignment,
        Quantity.WEIGHT_ALIGNMENT: weight_alignment,
        Quantity.ALIGNMENT_RATIO: _ratio(update_alignment, weight_alignment),
        Quantity.RELATIVE_CHANGE: _ratio(change, output),
    }


def _ratio(above: float, below: float) -> float:
    """NaN where nothing is to be divided by: zero-initialised weights before their first step."""
    return above / below if below > 0 else math.nan
