"""One rank that trains a step and counts the bytes that Megatron and autograd really hold.

Started as ``python -m tests.planning.memory_worker JOB RANK``; writes ``CELL.rankR.json`` for each
cell of the job. The norm is one kernel that keeps its input, as on a GPU: the CPU's bf16 norm is
several, and keeps their results.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

from megatron_mup.config import RunConfig
from megatron_mup.model import layer_specs
from megatron_mup.model.layer_specs import RMSNorm
from megatron_mup.optimizer.main_weights import single_optimizers
from megatron_mup.training.batches import micro_batches
from megatron_mup.training.processes import Launch, check_layout, parallel_processes
from megatron_mup.training.state import TrainState, build_state
from megatron_mup.training.step import train_step
from tests.configurations import tiny
from tests.distributed.ranks import joined, write_result
from tests.random_samples import RandomSamples


class OneKernelNorm(torch.autograd.Function):
    """RMSNorm without gain that keeps its input alone."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, eps: float) -> Tensor:
        """Normalize the last dimension."""
        ctx.save_for_backward(hidden)
        ctx.eps = eps
        return functional.rms_norm(hidden, hidden.shape[-1:], None, eps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Differentiate by computing the norm again, outside the hooks that count."""
        (saved,) = ctx.saved_tensors
        hidden = saved.detach().requires_grad_()
        plain = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
        with torch.enable_grad(), plain:
            normed = functional.rms_norm(hidden, hidden.shape[-1:], None, ctx.eps)
        (result,) = torch.autograd.grad(normed, hidden, gradients[0])
        return result, None


class _Kept:
    """A tensor that autograd keeps; tells the count when it is let go."""

    def __init__(self, tensor: Tensor, count: PeakCount) -> None:
        self.tensor, self._count = tensor, count
        self._place = tensor.untyped_storage().data_ptr()
        self._size = tensor.untyped_storage().nbytes()
        count.add(self._place, self._size)

    def __del__(self) -> None:
        self._count.remove(self._place, self._size)


class PeakCount:
    """Largest number of bytes of all storages that autograd keeps at a time."""

    def __init__(self, never: set[int]) -> None:
        self._never, self._uses = never, Counter[int]()
        self._bytes = self.peak = 0

    def pack(self, tensor: Tensor) -> Any:
        """Count a tensor unless its storage is a weight's."""
        if tensor.untyped_storage().data_ptr() in self._never:
            return tensor
        return _Kept(tensor, self)

    def unpack(self, kept: Any) -> Tensor:
        """The tensor again."""
        return kept.tensor if isinstance(kept, _Kept) else kept

    def add(self, place: int, size: int) -> None:
        """Count a use of a storage."""
        self._uses[place] += 1
        if self._uses[place] == 1:
            self._bytes += size
            self.peak = max(self.peak, self._bytes)

    def remove(self, place: int, size: int) -> None:
        """Forget a use of a storage."""
        self._uses[place] -= 1
        if self._uses[place] == 0:
            self._bytes -= size


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Address and size of each storage, once."""
    found = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage.nbytes() for storage in found}


def state_bytes(state: TrainState) -> dict[str, int]:
    """Bytes of weights, gradient buffers, and what the optimizer holds beside them."""
    weights = storages(
        p for chunk in state.model_chunks for p in chunk.parameters() if p.requires_grad
    )
    gradients = storages(
        buffer.grad_data
        for chunk in state.wrapped_chunks
        for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]
    )
    held = [
        tensor
        for part, _ in single_optimizers(state.optimizer)
        for group in part.optimizer.param_groups
        for parameter in group["params"]
        for tensor in (parameter, *part.optimizer.state[parameter].values())
        if isinstance(tensor, Tensor) and tensor.dim() > 0
    ]
    optimizer = {
        place: size
        for place, size in storages(held).items()
        if place not in weights and place not in gradients
    }
    return {
        "weights": sum(weights.values()),
        "gradients": sum(gradients.values()),
        "optimizer": sum(optimizer.values()),
    }


def measured(run: RunConfig, launch: Launch) -> dict[str, int]:
    """What this rank holds in and after a step."""
    from megatron.core import parallel_state

    data_size = check_layout(run, launch.world_size)
    state = build_state(run)
    tensors = [t for c in state.model_chunks for t in (*c.parameters(), *c.buffers())]
    count = PeakCount(set(storages(tensors)))
    batches = micro_batches(
        RandomSamples(run.model.vocab_size, run.model.seq_length),
        first=0,
        batch_size=run.training.global_batch_size,
        micro_batch_size=run.training.micro_batch_size,
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=data_size,
    )
    steps = run.training.global_batch_size // run.training.micro_batch_size // data_size
    with torch.autograd.graph.saved_tensors_hooks(count.pack, count.unpack):
        train_step(state, batches, steps)
    return {**state_bytes(state), "activations": count.peak}


def _one_kernel(norm: RMSNorm, hidden: Tensor) -> Tensor:
    result: Tensor = OneKernelNorm.apply(hidden, norm.eps)
    return result


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def main() -> None:
    """Measure every cell of the job."""
    RMSNorm.forward = _one_kernel  # type: ignore[method-assign]
    # The plan is of GPUs, whose attention keeps bf16.
    layer_specs.widened_on_cpu = _as_it_is
    with joined() as (job, launch):
        for layout in job["layouts"]:
            runs = {name: tiny(*options) for name, options in layout.items()}
            with parallel_processes(next(iter(runs.values())), launch):
                for name, run in runs.items():
                    write_result(job, f"{name}.rank{launch.rank}.json", measured(run, launch))


if __name__ == "__main__":
    main()
