"""Reading a checkpoint never runs code from it.

A pickle may name any function and call it. megatron-core 0.19.2 with torch 2.11 unpickles three
things of a torch_dist checkpoint:

    .metadata       ``pickle.load`` in ``torch.distributed.checkpoint.filesystem``, unrestricted
    items           ``torch.load(weights_only=False)`` in DCP's ``default_planner.load_bytes``
                    (non-tensor items), restricted for tensors, for ``common_state`` and, unless
                    the environment says otherwise, for the legacy ``common.pt``
    _extra_state    ``pickle.loads`` of a byte tensor in TransformerEngine's ``set_extra_state``

``safe_reading`` puts an allow-list before the first and torch's own restricted unpickler before the
second; ``loading_extra_states`` looks through the third before a module sees it. Importing
megatron.core already makes ``torch.storage._load_from_bytes``, the nested pickle of a tensor,
restricted. Objects that ranks send each other are not files and stay as they are.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

from megatron_mup.errors import CheckpointError

_FLOATS = ["bfloat16", "float16", "float32", "float64", "float8_e4m3fn", "float8_e5m2"]
_INTEGERS = ["bool", "uint8", "int8", "int16", "uint16", "int32", "uint32", "int64", "uint64"]

METADATA_GLOBALS = frozenset(
    {("torch", "Size"), ("torch.serialization", "_get_layout")}
    | {("torch", name) for name in (*_FLOATS, *_INTEGERS)}
    | {("torch.distributed.checkpoint.filesystem", "_StorageInfo")}
    | {
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    }
)
"""All that ``.metadata`` of plain, bf16 and distributed-optimizer runs names: measured."""

_NESTED = frozenset(
    {
        ("torch.storage", "_load_from_bytes"),
        ("megatron.core.safe_globals", "safe_load_from_bytes"),
    }
)

EXTRA_STATE_GLOBALS = frozenset(
    {("collections", "OrderedDict"), ("torch", "Size"), ("torch._utils", "_rebuild_tensor_v2")}
    | {
        ("transformer_engine.common.recipe", name)
        for name in (
            "DelayedScaling",
            "Float8BlockScaling",
            "Float8CurrentScaling",
            "Format",
            "MMParams",
            "QParams",
            "_FormatHelper",
            "_OverrideLinearPrecision",
        )
    }
    | {("megatron.core.extensions.transformer_engine", "TEDelayedScaling")}
)
"""What TransformerEngine 2's ``get_extra_state`` can pickle under our recipes: CPU tensors, the
recipe and plain values. Source: ``pytorch/module/base.py``, ``common/recipe/__init__.py``."""

_ENGINES_PERMISSION = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"

_GLOBAL = re.compile(r"\bGLOBAL ([\w.]+)")


@contextlib.contextmanager
def safe_reading(folder: Path) -> Iterator[None]:
    """Read a checkpoint inside this block and nothing of it is run.

    Affects the whole process while it lasts; the restrictions are stricter than what they replace.

    Args:
        folder: the checkpoint; for messages.

    Raises:
        CheckpointError: a file names something that plain data does not need, or a file outside
            the folder; whatever the readers in between made of the refusal.
    """
    refusals: list[CheckpointError] = []
    module: Any = filesystem
    read_torch, read_pickle = torch.load, module.pickle
    # Both names are looked up at each call (torch 2.11); there is no public seam for either.
    torch.load = _restricted_load(read_torch, folder, refusals)
    module.pickle = _metadata_reader(folder, refusals)
    try:
        yield
    except (Exception, CheckpointException) as error:
        # DCP wraps what its readers raise; torch's CheckpointException is a BaseException.
        if refusals:
            raise refusals[0] from error
        raise
    finally:
        torch.load, module.pickle = read_torch, read_pickle
    if refusals:
        raise refusals[0]


def check_extra_states(tree: Any) -> None:
    """Check every ``_extra_state`` of a loaded state dict.

    Args:
        tree: nested dicts and lists as ``dist_checkpointing.load`` returns them.

    Raises:
        CheckpointError: as ``check_extra_state``.
    """
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            if isinstance(key, str) and "_extra_state" in key:
                check_extra_state(value, name=key)
            else:
                check_extra_states(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            check_extra_states(value)


def check_extra_state(blob: Any, *, name: str = "_extra_state") -> None:
    """Refuse an ``_extra_state`` that would run code when TransformerEngine unpickles it.

    The pickle is read with inert stand-ins, so the check needs no TransformerEngine and builds
    none of its objects.

    Args:
        blob: byte tensor (uint8 [bytes], any device) as TransformerEngine 2 saves it, a BytesIO as
            version 1 did, or None.
        name: its key; for messages.

    Raises:
        CheckpointError: it names something else than tensors and recipes, or is damaged.
    """
    try:
        if isinstance(blob, io.BytesIO):
            blob.seek(0)
            torch.load(blob, map_location="cpu", weights_only=True)
            blob.seek(0)
        elif isinstance(blob, torch.Tensor) and blob.dtype == torch.uint8:
            if blob.numel() > 0:
                _ExtraStateUnpickler(io.BytesIO(blob.detach().cpu().numpy().tobytes())).load()
        elif blob is not None:
            raise pickle.UnpicklingError(f"it is a {type(blob).__name__}, not bytes")
    # A damaged pickle can raise anything.
    except Exception as error:
        raise _refusal(name, error) from error


@contextlib.contextmanager
def loading_extra_states(tree: Any) -> Iterator[None]:
    """Check every ``_extra_state`` of a loaded state dict, and let modules load them inside.

    TransformerEngine (2.17 and 2.20) refuses to unpickle delayed scaling's state, whatever is in
    it, unless the environment allows that; without it no delayed run could be resumed.

    Args:
        tree: as for ``check_extra_states``.

    Raises:
        CheckpointError: as ``check_extra_state``, before the block.
    """
    check_extra_states(tree)
    before = os.environ.get(_ENGINES_PERMISSION)
    os.environ[_ENGINES_PERMISSION] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_ENGINES_PERMISSION]
        else:
            os.environ[_ENGINES_PERMISSION] = before


def _allow(allowed: frozenset[tuple[str, str]], module: str, name: str) -> None:
    # Exact pairs: a dotted name would walk from an allowed class to its methods' globals.
    if (module, name) not in allowed:
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")


class _MetadataUnpickler(pickle.Unpickler):
    """Builds the classes of ``.metadata`` and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        _allow(METADATA_GLOBALS, module, name)
        if name == "_get_layout":
            # A builtin's bound method has no attributes that the next opcode could set.
            return {"torch.strided": torch.strided}.__getitem__
        return super().find_class(module, name)


class _Inert:
    """Stands for every class and function that an ``_extra_state`` may name."""

    def __new__(cls, *_arguments: Any) -> _Inert:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


class _ExtraStateUnpickler(pickle.Unpickler):
    """Reads every opcode and builds nothing but plain data."""

    def find_class(self, module: str, name: str) -> Any:
        _allow(EXTRA_STATE_GLOBALS | _NESTED, module, name)
        return _check_nested if (module, name) in _NESTED else _Inert


def _check_nested(blob: bytes) -> _Inert:
    """A tensor inside a pickle is itself bytes of ``torch.save``."""
    torch.load(io.BytesIO(blob), map_location="cpu", weights_only=True)
    return _Inert()


def _restricted_load(
    original: Callable[..., Any], folder: Path, refusals: list[CheckpointError]
) -> Callable[..., Any]:
    """``torch.load`` that reads data only, whatever its caller asked for."""

    def load(*args: Any, **kwargs: Any) -> Any:
        try:
            return original(*args, **{**kwargs, "weights_only": True})
        except pickle.UnpicklingError as error:
            refusals.append(_refusal(f"{folder}: an item", error))
            raise refusals[-1] from error

    return load


def _metadata_reader(folder: Path, refusals: list[CheckpointError]) -> SimpleNamespace:
    """What ``torch.distributed.checkpoint.filesystem`` uses of the module pickle."""

    def load(stream: BinaryIO) -> Metadata:
        name = getattr(stream, "name", folder / ".metadata")
        try:
            metadata = _MetadataUnpickler(stream).load()
            _check_metadata(metadata, Path(name).parent)
        except Exception as error:
            refusals.append(_refusal(str(name), error))
            raise refusals[-1] from error
        assert isinstance(metadata, Metadata)
        return metadata

    return SimpleNamespace(load=load, dump=pickle.dump)


def _check_metadata(metadata: Any, folder: Path) -> None:
    """Check what the reader will do with the files: UnpicklingError says what is wrong."""
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise pickle.UnpicklingError("it does not describe a checkpoint")
    files = set()
    for info in metadata.storage_data.values():
        sizes = (getattr(info, "offset", None), getattr(info, "length", None))
        if type(info) is not filesystem._StorageInfo or any(
            type(size) is not int or size < 0 for size in sizes
        ):
            raise pickle.UnpicklingError("an item has no place in a file")
        if info.transform_descriptors:
            raise pickle.UnpicklingError("an item is compressed, which megatron never writes")
        files.add(info.relative_path)
    inside = folder.resolve()
    for name in files:
        if (inside / name).resolve().parent != inside:
            raise pickle.UnpicklingError(f"it places data in {name!r}, outside the folder")


def _refusal(subject: str, error: Exception) -> CheckpointError:
    """Say in one line which global was refused, or what else is wrong."""
    match = _GLOBAL.search(str(error))
    if match:
        return CheckpointError(
            f"{subject} names '{match[1]}', which no checkpoint needs and which could run code; "
            "nothing of it was run; use a checkpoint from a source that you trust"
        )
    lines = [line.strip() for line in str(error).splitlines() if "rror: " in line]
    reason = lines[-1] if lines else str(error).strip().split("\n")[0] or type(error).__name__
    return CheckpointError(
        f"{subject} holds something else than plain data ({reason}); use another iter_* folder or "
        "a checkpoint from a source that you trust"
    )
