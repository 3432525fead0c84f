"""Run a model that does not fit into memory: each block's weights come just before its forward.

A block is a module with the parameters that its forward needs: a linear layer with its matrix, a
transformer layer with its vectors. Between two uses a parameter keeps shape, dtype and identity but
points at a single NaN, so weights that nobody fetched show in every output. Nothing here knows
Megatron or transformers. Not thread-safe: building patches a torch-wide hook for its duration.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import register_module_parameter_registration_hook

from megatron_mup.errors import CheckpointError

Fetch = Callable[[str], Tensor]
"""From a parameter's name to its values; any dtype and device."""

_LOGITS_BYTES = 1 << 27
"""Logits that are in memory at once, in fp64: those of all positions may be larger than a layer."""

_LAYER = re.compile(r"((?:.*\.)?layers\.\d+)\.")


@contextmanager
def without_weights() -> Iterator[None]:
    """Modules built inside have their parameters on the meta device; buffers are real.

    Building under ``torch.device("meta")`` would lose the values of buffers that no checkpoint
    holds, such as the frequencies of rotary embeddings.
    """
    # A module that allocates before it registers costs address space only: the pages of torch.empty
    # are not touched, and its own initialization then runs on the meta device.
    hook: Callable[..., Any] = _on_meta
    handle = register_module_parameter_registration_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _on_meta(
    _module: torch.nn.Module, _name: str, parameter: torch.nn.Parameter | None
) -> torch.nn.Parameter | None:
    # The identity of one that is registered again is what ties two modules.
    if parameter is None or parameter.is_meta:
        return None
    empty = torch.nn.Parameter(parameter.to("meta"), requires_grad=False)
    vars(empty).update(vars(parameter))
    return empty


def blocks_of(model: torch.nn.Module) -> dict[str, tuple[str, ...]]:
    """The blocks of a decoder: modules that hold matrices, and its layers for their vectors.

    Args:
        model: any module whose transformer layers are in a list named ``layers``. Matrices must be
            used where they are held; Megatron adds a bias only after the linear layer's forward.

    Returns:
        Name of a submodule -> names of the parameters that its forward needs. A tied parameter is
        in each block that uses it, under that block's name for it.
    """
    blocks: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        layer = _LAYER.match(name) if parameter.dim() < 2 else None
        blocks.setdefault(layer[1] if layer else name.rpartition(".")[0], []).append(name)
    return {block: tuple(names) for block, names in blocks.items()}


@contextmanager
def streamed(
    model: torch.nn.Module,
    blocks: Mapping[str, Sequence[str]],
    fetch: Fetch,
    *,
    device: torch.device,
    kept: str | None = None,
) -> Iterator[None]:
    """Give each block its weights for the time of its forward, while the context lasts.

    Args:
        model: built ``without_weights``; its buffers move to ``device``.
        blocks: see ``blocks_of``; two that share a parameter must not run in each other.
        fetch: called with the first name of each parameter of a block, every time the block runs.
        device: where the model computes.
        kept: a block that keeps its weights after its first forward, for it runs several times.

    Raises:
        CheckpointError: a parameter is in no block, or what was fetched has another shape.
    """
    tenants = _tenants(model, device)
    used = {tenants[name].name for names in blocks.values() for name in names}
    forgotten = sorted({tenant.name for tenant in tenants.values()} - used)
    if forgotten:
        raise CheckpointError(f"no block of the model holds its parameter {forgotten[0]}")
    handles = []
    for block, names in blocks.items():
        module = model.get_submodule(block)
        here = [tenants[name] for name in names]
        handles.append(module.register_forward_pre_hook(_filler(here, fetch)))
        if block != kept:
            # Registered last, so that other hooks of the module still see the weights.
            handles.append(module.register_forward_hook(_emptier(here)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for tenant in tenants.values():
            tenant.empty()


class _Tenant:
    """A parameter that has its values only for a time."""

    def __init__(self, name: str, parameter: torch.nn.Parameter, device: torch.device) -> None:
        self.name = name
        # One element for all: a copy of the whole tensor would be what is to be avoided.
        nan = torch.full((), torch.nan, dtype=parameter.dtype, device=device)
        self._nothing = nan.expand(parameter.shape)
        self.parameter = torch.nn.Parameter(self._nothing, requires_grad=False)
        vars(self.parameter).update(vars(parameter))
        self._full = False

    def fill(self, fetch: Fetch) -> None:
        if self._full:
            return
        values = fetch(self.name)
        if values.shape != self.parameter.shape:
            raise CheckpointError(
                f"{self.name} has shape {list(values.shape)}, the model needs "
                f"{list(self.parameter.shape)}"
            )
        self.parameter.data = values.to(self.parameter.device, self.parameter.dtype)
        self._full = True

    def empty(self) -> None:
        self.parameter.data = self._nothing
        self._full = False


def _tenants(model: torch.nn.Module, device: torch.device) -> dict[str, _Tenant]:
    """Replace all parameters by tenants; those of tied names are one object as before."""
    known: dict[int, _Tenant] = {}
    tenants = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        tenant = known.setdefault(id(parameter), _Tenant(name, parameter, device))
        tenants[name] = tenant
        owner, _, own_name = name.rpartition(".")
        model.get_submodule(owner).register_parameter(own_name, tenant.parameter)
    for module in model.modules():
        for own_name, buffer in list(module.named_buffers(recurse=False)):
            persistent = own_name not in module._non_persistent_buffers_set
            module.register_buffer(own_name, buffer.to(device), persistent=persistent)
    return tenants


def _filler(tenants: Sequence[_Tenant], fetch: Fetch) -> Callable[..., None]:
    def fill(_module: torch.nn.Module, _inputs: Any) -> None:
        for tenant in tenants:
            tenant.fill(fetch)

    return fill


def _emptier(tenants: Sequence[_Tenant]) -> Callable[..., None]:
    def empty(_module: torch.nn.Module, _inputs: Any, _output: Any) -> None:
        for tenant in tenants:
            tenant.empty()

    return empty


def next_token_logprobs(logits_BSV: Tensor, tokens_BS: Tensor) -> Tensor:
    """Log-probability of each next token, in fp64 from the logits as they are.

    Args:
        logits_BSV: of any float dtype.
        tokens_BS: int64 ids; the logits at position s predict token s + 1.

    Returns:
        float64 [B, S - 1] on the CPU, natural logarithm.
    """
    columns = []
    # Position by position: the logits are the largest activation, and fp64 doubles them.
    for position in range(tokens_BS.shape[1] - 1):
        logits_BV = logits_BSV[:, position].double()
        chosen_B = logits_BV.gather(1, tokens_BS[:, position + 1, None])[:, 0]
        columns.append((chosen_B - logits_BV.logsumexp(1)).cpu())
    return torch.stack(columns, 1)


def sliced_logprobs(
    logits_at: Callable[[int, int], Tensor], tokens_BS: Tensor, *, vocabulary: int
) -> Tensor:
    """Log-probabilities as ``next_token_logprobs``, from the logits of few positions at a time.

    Args:
        logits_at: given the first position and the one after the last, their logits [B, positions,
            vocabulary], of any float dtype; called in order.
        tokens_BS: int64 ids.
        vocabulary: number of ids.

    Returns:
        float64 [B, S - 1] on the CPU, natural logarithm.
    """
    batch, length = tokens_BS.shape
    step = max(1, _LOGITS_BYTES // (8 * batch * vocabulary))
    columns = []
    for first in range(0, length - 1, step):
        last = min(first + step, length - 1)
        tokens = tokens_BS[:, first : last + 1]
        columns.append(next_token_logprobs(logits_at(first, last), tokens))
    return torch.cat(columns, 1)
