"""The only file that knows there may be no GPU.

megatron-core 0.19.2 names CUDA in places that a CPU run reaches: ``device="cuda"`` literals in the
schedules, gradient clipping and optimizers, the CUDA RNG tracker, and type checks against
``torch.cuda.FloatTensor``. On a machine without CUDA ``prepare`` points these at the CPU; on a
machine with CUDA it does nothing. It must run before ``megatron`` is imported, because
``megatron.core.tensor_parallel.random`` binds ``torch.cuda._lazy_call`` by name; the packages that
import megatron (``model``, ``optimizer``, ``training``) call it first.

Each patch below says which upstream line needs it (megatron-core 0.19.2). Must not import megatron.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

logger = logging.getLogger(__name__)

_CPU = torch.device("cpu")


def has_cuda() -> bool:
    """Whether a CUDA device can be used."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """The device of this process: its CUDA device, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if has_cuda() else _CPU


def distributed_backend() -> str:
    """``nccl`` on GPUs, ``gloo`` on CPUs."""
    return "nccl" if has_cuda() else "gloo"


def bind_device(local_rank: int) -> None:
    """Select this process's GPU; nothing to do on a CPU."""
    if has_cuda():
        torch.cuda.set_device(local_rank % torch.cuda.device_count())


def slow_bf16() -> str | None:
    """A warning where matrix products in bf16 take far longer than in fp32; None elsewhere.

    On x86 torch 2.11 leaves them to oneDNN where there is AVX-512, and else to a plain loop.
    """
    found = torch.cpu.get_capabilities()
    if has_cuda() or found.get("architecture") != "x86_64" or found.get("avx512_dq"):
        return None
    return (
        f"precision.bf16 is slow on this CPU ({found.get('cpu_name', 'x86_64')}): without AVX-512, "
        "torch takes about 50 times as long for matrix products in bf16 as in fp32; set "
        "precision.bf16=false here"
    )


_DETERMINISTIC = {
    # cuBLAS: one workspace per stream (documented under torch.use_deterministic_algorithms).
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
    # NCCL: the choices that Megatron-LM accepts in deterministic mode; the first is taken.
    "NCCL_ALGO": ("Ring", "Tree", "CollnetDirect", "CollnetChain", "^NVLS"),
    # TransformerEngine's attention; megatron-core refuses deterministic_mode without it.
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0",),
}
"""Variables that make the libraries deterministic, with the values that do."""


@contextmanager
def deterministic() -> Iterator[None]:
    """Allow only algorithms that give the same bits every time, while the context lasts.

    The libraries read the variables when they start, so enter it before CUDA is initialized. A
    variable with another value is overwritten with a warning.
    """
    before = {name: os.environ.get(name) for name in _DETERMINISTIC}
    strict = torch.are_deterministic_algorithms_enabled()
    for name, values in _DETERMINISTIC.items():
        given = before[name]
        if given not in values:
            os.environ[name] = values[0]
        if given is not None and given not in values:
            logger.warning(f"precision.deterministic_mode sets {name}={values[0]}; it was {given}")
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(strict)
        for name, given in before.items():
            os.environ.pop(name) if given is None else os.environ.update({name: given})


def _keep_freed_memory() -> None:
    """Let glibc reuse freed activations instead of giving them back to the kernel each step.

    By default it unmaps large blocks and trims the heap, and a training step of the 3M benchmark
    model then faults in 10,000 pages again: 4% of its CPU time. Peak memory stays the same.
    The numbers are malloc.h's M_MMAP_THRESHOLD (-3), at its largest value, and M_TRIM_THRESHOLD.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # Absent from other C libraries; failure only costs the time.
    if mallopt is not None:
        mallopt(-3, 32 * 1024 * 1024)
        mallopt(-1, 2**31 - 1)


class _CpuGenerators:
    """Stands for ``torch.cuda.default_generators``: one generator, the CPU's."""

    def __getitem__(self, index: int) -> torch.Generator:
        return torch.default_generator


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Wrap a tensor factory so that ``device="cuda"`` means the CPU and nothing is pinned."""

    @functools.wraps(factory)
    def wrapped(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("device") == "cuda":
            kwargs["device"] = _CPU
        # rope_utils.py:62: pinned for the transfer to the GPU, which pinning alone already needs.
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return wrapped


def _cuda_type_name(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``Tensor.type`` so that Megatron's CUDA type assertions hold for CPU tensors."""

    @functools.wraps(original)
    def wrapped(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        if args or kwargs or not isinstance(result, str):
            return result
        return result.replace("torch.", "torch.cuda.", 1)

    return wrapped


def _patch_torch_for_cpu() -> None:
    # torch lists the factories that obey ``with torch.device(...)`` once, at its first use: it must
    # list the originals, or transformers builds half of a model outside the device it asked for.
    with torch.device("meta"):
        torch.empty(0)
    cuda: Any = torch.cuda
    # schedules.py:749, attention global buffers: the current device.
    cuda.current_device = lambda: _CPU
    # p2p_communication.py, finalize: waits for kernels.
    cuda.synchronize = lambda *args, **kwargs: None
    # param_and_grad_buffer.py:632: stream of the gradient reduction.
    cuda.current_stream = lambda *args, **kwargs: None
    # tensor_parallel/random.py: the RNG tracker forks and restores the CUDA generator.
    cuda.get_rng_state = cuda.random.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.manual_seed = torch.default_generator.manual_seed
    cuda.default_generators = _CpuGenerators()
    cuda._lazy_call = lambda callback, **kwargs: callback()
    # schedules.py:1121, optimizer.py:1249, clip_grads.py:96: scalars made on "cuda".
    for name in ("tensor", "zeros", "ones"):
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    # language_module.py:307, optimizer loading: moves of a tensor to the GPU.
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    # clip_grads.py:174, optimizer.py:1009: parameters are sorted by CUDA type name.
    torch.Tensor.type = _cuda_type_name(torch.Tensor.type)  # type: ignore[method-assign]


@functools.cache
def prepare() -> None:
    """Make this process able to import and run megatron-core; idempotent.

    Must come before the first import of ``megatron``; silences upstream's notices that ask for
    nothing (deprecation of GPTModel, absent TransformerEngine and apex).
    """
    warnings.filterwarnings("ignore", module=r"megatron\.|torch\.distributed")
    warnings.filterwarnings("ignore", message=".*(Apex|Transformer Engine|transformer_engine).*")
    for name in ("megatron.core", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if has_cuda():
        return
    if "megatron.core.tensor_parallel.random" in sys.modules:
        raise RuntimeError(
            "megatron.core was imported before megatron_mup on a machine without CUDA; "
            "import megatron_mup.model (or call megatron_mup.platform.prepare) first"
        )
    # torch.compile's CPU warm-up takes 30 s and gains nothing measurable at this scale.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    _patch_torch_for_cpu()
    _keep_freed_memory()
