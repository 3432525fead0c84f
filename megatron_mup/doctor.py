"""What this machine offers for training, what it lacks, and how to mend that.

Owns the list of the optional kernels with the conditions under which each is used, and the
conditions for FP8. ``read_facts`` looks at the machine; ``diagnose`` judges what it found and is
pure, so a machine with another GPU can be judged from its facts. Must not import megatron: the
answer has to come quickly, and also where megatron cannot be imported.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
from dataclasses import dataclass

COMPONENTS = (
    "torch",
    "megatron-core",
    "numpy",
    "sentencepiece",
    "emerging-optimizers",
    "triton",
    "transformer-engine",
    "apex",
    "flash-attn",
)
"""Distributions whose versions are reported."""

TRANSFORMER_ENGINE = "transformer_engine.pytorch"
APEX_WEIGHT_GRADIENT = "fused_weight_gradient_mlp_cuda"
APEX_OPTIMIZERS = "apex.optimizers"
EXTENSIONS = (TRANSFORMER_ENGINE, APEX_WEIGHT_GRADIENT, APEX_OPTIMIZERS)
"""Modules whose import decides, here as in megatron-core, whether a kernel is used."""

FP8_CAPABILITY = (8, 9)
"""Least compute capability for FP8. Source: ``check_fp8_support`` in TransformerEngine."""

FLASH_CAPABILITY = (8, 0)
"""Least compute capability of the fused attention kernels of PyTorch and TransformerEngine."""

CUDA_CURE = (
    "run on a machine with an NVIDIA GPU whose driver supports the CUDA version that torch is "
    "built for; `nvidia-smi` has to list the GPU"
)
TORCH_CURE = "install the torch that requirements.lock names: make venv"
TRANSFORMER_ENGINE_CURE = (
    'python -m pip install --no-build-isolation ".[gpu]" in this repository '
    "(compiles: needs nvcc of the CUDA version that torch is built for, and a C++ compiler)"
)
# The package index has an unrelated package called apex, hence the build from source.
APEX_CURE = (
    "git clone https://github.com/NVIDIA/apex && cd apex && APEX_CPP_EXT=1 APEX_CUDA_EXT=1 "
    "python -m pip install -v --no-build-isolation . (compiles: needs nvcc of the CUDA version "
    "that torch is built for)"
)


@dataclass(frozen=True)
class Component:
    """A package this project can use."""

    name: str
    """Name of the distribution."""
    version: str | None
    """Installed version; None if it is not installed."""


@dataclass(frozen=True)
class Device:
    """A CUDA device."""

    name: str
    """As the driver calls it."""
    capability: tuple[int, int]
    """Compute capability, major and minor."""
    memory_gib: float
    """Total memory in GiB."""


@dataclass(frozen=True)
class Extension:
    """An optional module, as importing it showed."""

    module: str
    """Dotted name of the module."""
    installed: bool
    """Whether its top-level module can be found."""
    error: str | None = None
    """Why importing it failed; None if it loads or is not installed."""

    @property
    def loads(self) -> bool:
        """Whether the module can be used."""
        return self.installed and self.error is None


@dataclass(frozen=True)
class Facts:
    """What was found on a machine, without judgement."""

    python: str
    """Version of the interpreter."""
    cpu_cores: int
    """Cores this process may use."""
    components: tuple[Component, ...]
    """Packages of ``COMPONENTS``."""
    torch_cuda: str | None = None
    """CUDA version that torch is built for; None for a build without CUDA."""
    cudnn: int | None = None
    """cuDNN's version number, such as 91900; None if torch finds none."""
    devices: tuple[Device, ...] = ()
    """CUDA devices that torch can use."""
    backends: tuple[str, ...] = ()
    """Distributed backends that torch is built with."""
    extensions: tuple[Extension, ...] = ()
    """Modules of ``EXTENSIONS``; one that is not listed counts as not installed."""

    def extension(self, module: str) -> Extension:
        """Find an extension.

        Args:
            module: Its dotted name.

        Returns:
            What is known of it.
        """
        found = (extension for extension in self.extensions if extension.module == module)
        return next(found, Extension(module, installed=False))


@dataclass(frozen=True)
class Lack:
    """A condition that this machine does not meet."""

    what: str
    """The condition and what was found instead."""
    cure: str
    """How to meet it."""


@dataclass(frozen=True)
class Kernel:
    """An optional kernel and why it is not used, if it is not."""

    name: str
    """What it computes and which package has it."""
    lacks: tuple[Lack, ...]
    """Unmet conditions; empty if the kernel is used."""

    @property
    def active(self) -> bool:
        """Whether the kernel is used."""
        return not self.lacks


@dataclass(frozen=True)
class DoctorReport:
    """The judgement on a machine."""

    python: str
    """Version of the interpreter."""
    cpu_cores: int
    """Cores this process may use."""
    components: tuple[Component, ...]
    """Packages of ``COMPONENTS``."""
    torch_cuda: str | None
    """CUDA version that torch is built for; None for a build without CUDA."""
    cudnn: int | None
    """cuDNN's version number; None if torch finds none."""
    devices: tuple[Device, ...]
    """CUDA devices; empty on a machine that trains on the CPU."""
    backends: tuple[str, ...]
    """Distributed backends that can be used here."""
    kernels: tuple[Kernel, ...]
    """Optional kernels, used or not."""
    fp8_lacks: tuple[Lack, ...]
    """What is missing for FP8; empty if FP8 can be used."""

    @property
    def fp8_ready(self) -> bool:
        """Whether FP8 can be used."""
        return not self.fp8_lacks


def collect() -> DoctorReport:
    """Examine this machine.

    Returns:
        Versions, devices, kernels and what is missing for FP8.
    """
    return diagnose(read_facts())


def read_facts() -> Facts:
    """Look at this machine; imports torch and, where they are installed, the extensions.

    Returns:
        What was found; without torch, only what can be known without it.
    """
    components = tuple(Component(name, _installed_version(name)) for name in COMPONENTS)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts = Facts(python=platform.python_version(), cpu_cores=cores or 1, components=components)
    if not _try_import("torch").loads:
        return facts
    import torch
    from torch import distributed

    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    backends = {
        "gloo": distributed.is_available() and distributed.is_gloo_available(),
        "nccl": distributed.is_available() and distributed.is_nccl_available(),
    }
    return Facts(
        python=facts.python,
        cpu_cores=facts.cpu_cores,
        components=components,
        torch_cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        devices=tuple(
            Device(p.name, (p.major, p.minor), p.total_memory / 2**30) for p in properties
        ),
        backends=tuple(name for name, built in backends.items() if built),
        extensions=tuple(_try_import(module) for module in EXTENSIONS),
    )


def diagnose(facts: Facts) -> DoctorReport:
    """Judge a machine by what was found on it.

    Args:
        facts: What was found.

    Returns:
        Which kernels are used there, and what is missing for the others and for FP8.
    """
    cuda = _cuda_lacks(facts)
    engine = cuda + _extension_lacks(facts, TRANSFORMER_ENGINE, cure=TRANSFORMER_ENGINE_CURE)
    weight_gradient = _extension_lacks(facts, APEX_WEIGHT_GRADIENT, cure=APEX_CURE)
    flash = cuda + _capability_lacks(facts, FLASH_CAPABILITY, purpose="fused attention")
    cudnn = () if facts.cudnn else (Lack("torch finds no cuDNN", TORCH_CURE),)
    # megatron-core takes TransformerEngine's Adam, else apex's, else PyTorch's.
    adam = cuda if facts.extension(APEX_OPTIMIZERS).loads else engine
    kernels = (
        Kernel("fused layers (TransformerEngine)", engine),
        Kernel("fused attention (TransformerEngine, cuDNN)", _merge(engine, flash, cudnn)),
        Kernel("flash attention (PyTorch)", flash),
        Kernel("fused Adam (TransformerEngine or apex)", adam),
        Kernel(f"fused weight gradient (apex, {APEX_WEIGHT_GRADIENT})", cuda + weight_gradient),
    )
    return DoctorReport(
        python=facts.python,
        cpu_cores=facts.cpu_cores,
        components=facts.components,
        torch_cuda=facts.torch_cuda,
        cudnn=facts.cudnn,
        devices=facts.devices,
        backends=tuple(name for name in facts.backends if name != "nccl" or facts.devices),
        kernels=kernels,
        fp8_lacks=_merge(engine, _capability_lacks(facts, FP8_CAPABILITY, purpose="FP8")),
    )


def render(report: DoctorReport) -> str:
    """Write a report for a person.

    Args:
        report: From ``collect`` or ``diagnose``.

    Returns:
        Lines of ASCII text, without a trailing line end; each cure once.
    """
    lines = ["Versions", f"  {'python':<20} {report.python}"]
    for component in report.components:
        lines.append(f"  {component.name:<20} {component.version or 'not installed'}")
    lines.append(f"  {'CUDA (torch)':<20} {report.torch_cuda or 'built without'}")
    lines.append(f"  {'cuDNN (torch)':<20} {report.cudnn or 'not found'}")
    lines += ["Devices", f"  CPU, {report.cpu_cores} cores"]
    for index, device in enumerate(report.devices):
        lines.append(
            f"  cuda:{index} {device.name}, compute capability {_dotted(device.capability)}, "
            f"{device.memory_gib:.0f} GiB"
        )
    lines += ["Distributed backends", f"  {', '.join(report.backends) or 'none'}"]
    lines.append("Kernels")
    for kernel in report.kernels:
        lines.append(f"  {'on ' if kernel.active else 'off'}  {kernel.name}")
        lines += [f"       missing: {lack.what}" for lack in kernel.lacks]
    lines += ["FP8", f"  {'ready' if report.fp8_ready else 'not ready'}"]
    lines += [f"       missing: {lack.what}" for lack in report.fp8_lacks]
    return "\n".join(lines + _render_cures(report))


def _render_cures(report: DoctorReport) -> list[str]:
    lacks = _merge(*(kernel.lacks for kernel in report.kernels), report.fp8_lacks)
    if not lacks:
        return []
    cures = [line for lack in lacks for line in (f"  {lack.what}:", f"    {lack.cure}")]
    return ["What to do (only for the kernels you want)", *cures]


def _cuda_lacks(facts: Facts) -> tuple[Lack, ...]:
    if facts.devices:
        return ()
    if facts.torch_cuda is None:
        return (Lack("torch with CUDA", TORCH_CURE), Lack("a CUDA device", CUDA_CURE))
    return (Lack(f"a CUDA device (torch is built for CUDA {facts.torch_cuda})", CUDA_CURE),)


def _extension_lacks(facts: Facts, module: str, *, cure: str) -> tuple[Lack, ...]:
    extension = facts.extension(module)
    if extension.loads:
        return ()
    state = f"fails to import: {extension.error}" if extension.installed else "is not installed"
    return (Lack(f"{module} {state}", cure),)


def _capability_lacks(facts: Facts, least: tuple[int, int], *, purpose: str) -> tuple[Lack, ...]:
    """Name the devices below a compute capability; without any device, the need as such."""
    need = f"compute capability {_dotted(least)} or higher for {purpose}"
    cure = f"use GPUs of compute capability {_dotted(least)} or higher"
    if not facts.devices:
        return (Lack(need, cure),)
    return tuple(
        Lack(f"{need}; cuda:{index} {device.name} has {_dotted(device.capability)}", cure)
        for index, device in enumerate(facts.devices)
        if device.capability < least
    )


def _merge(*groups: tuple[Lack, ...]) -> tuple[Lack, ...]:
    """Join, each lack once, in the order of their first mention."""
    return tuple(dict.fromkeys(lack for group in groups for lack in group))


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


def _installed_version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _try_import(module: str) -> Extension:
    """Import a module if its top-level module is there.

    A compiled extension that was built for another torch is found but fails to load, with whatever
    its loader raises, so finding it proves nothing and no narrower exception will do.
    """
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        return Extension(module, installed=False)
    try:
        importlib.import_module(module)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return Extension(module, installed=True, error=reason)
    return Extension(module, installed=True)
