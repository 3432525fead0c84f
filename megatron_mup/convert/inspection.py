"""What a checkpoint is: a run's, or a folder that transformers loads. Weights are not read.

Fills one report for both; tensors come from their descriptions (``.metadata``, the headers of
safetensors files), so a folder of any size is told in a second. Whether it is whole is told by the
sizes of the files, and by their SHA-256 when asked for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_mup.checkpoint.folders import read_record
from megatron_mup.checkpoint.integrity import CHECKSUMS, check_files, read_checksums
from megatron_mup.convert.formats import HfTensor, hf_tensors, stored_model
from megatron_mup.convert.huggingface_config import read_config
from megatron_mup.convert.huggingface_folder import (
    CONFIG_FILE,
    HuggingFaceFolder,
    read_json,
    several,
)
from megatron_mup.convert.megatron_source import find_folder, recorded_run
from megatron_mup.convert.safetensors_shards import DTYPES
from megatron_mup.convert.stored_blocks import Sizes
from megatron_mup.convert.stored_places import COMMON_STATE, OPTIMIZER_PREFIX, place_of
from megatron_mup.convert.stored_tensors import StoredTensors
from megatron_mup.convert.weight_checksums import changed_weights, has_checksums
from megatron_mup.convert.weights import all_finite
from megatron_mup.errors import CheckpointError
from megatron_mup.parameterization.roles import ModelShape, logical_tensors

_LAYER = re.compile(r"\.layers\.\d+\.")
_LAYOUT = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "context_parallel_size",
    "use_distributed_optimizer",
)


@dataclass(frozen=True, kw_only=True)
class TensorGroup:
    """Tensors that differ in their layer only.

    Attributes:
        name: with ``*`` for the layer, or Megatron's key of the stacked layers.
        role: what they do: a role of the rule table, ``optimizer`` with the kind of state, or
            ``other``.
        count: how many.
        shape: of each.
        dtype: as stored.
        nbytes: of all together.
    """

    name: str
    role: str
    count: int
    shape: Sizes
    dtype: str
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What a checkpoint says of itself.

    Attributes:
        folder: the checkpoint.
        kind: ``megatron_mup``, or the model_type of a folder for transformers.
        iteration: finished iterations; None for transformers.
        model: options of the architecture.
        parameters: elements of all logical tensors.
        parameterization: rule set and its own options; empty for transformers.
        multipliers: the forward multipliers under which the weights are the function.
        layout: that of the run that saved it.
        optimizer: name and stored kinds of state; empty without.
        dtypes: of the weights.
        groups: all tensors.
        provenance: where it comes from.
        problems: what is wrong, as sentences; empty when it is whole.
        checked: ``sizes`` of the files, or their ``sha256``; for a folder for transformers its
            ``headers``, or all ``values``, or ``sha256 and values`` if it lists checksums.
    """

    folder: Path
    kind: str
    iteration: int | None = None
    model: Mapping[str, Any]
    parameters: int
    parameterization: Mapping[str, Any] = field(default_factory=dict)
    multipliers: Mapping[str, float]
    layout: Mapping[str, Any] = field(default_factory=dict)
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    dtypes: tuple[str, ...]
    groups: tuple[TensorGroup, ...]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    problems: tuple[str, ...]
    checked: str

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(group.nbytes for group in self.groups)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "folder": str(self.folder), "nbytes": self.nbytes}


def inspect_checkpoint(
    path: Path, iteration: int | None = None, *, check: bool = False
) -> Inspection:
    """Look into a checkpoint.

    Args:
        path: a run's folder, an ``iter_*`` folder, or a folder with config.json and safetensors.
        iteration: which checkpoint of a run's folder; unset means the newest.
        check: compare the SHA-256 of all files, which reads all of them; of a folder for
            transformers, that of the weights if it is listed, and read all tensors.

    Raises:
        CheckpointError: it is none of these, or its description cannot be read.
    """
    if (path / CONFIG_FILE).is_file():
        return _inspect_huggingface(path, check=check)
    return _inspect_megatron(find_folder(path, iteration), check=check)


def _inspect_megatron(folder: Path, *, check: bool) -> Inspection:
    record = read_record(folder)
    run = recorded_run(record, folder)
    stored = StoredTensors(folder)
    groups = tuple(_megatron_groups(stored, run.model.shape))
    problems = _problems(folder, stored, check=check)
    common = stored.read_object(COMMON_STATE)
    finished = common.get("iteration") if isinstance(common, dict) else None
    if not isinstance(finished, int):
        problems.append(f"{folder}: {COMMON_STATE} names no iteration.")
        finished = None
    kinds = sorted({key.split(".")[2] for key in stored.tensors if _is_optimizer(key)})
    return Inspection(
        folder=folder,
        kind="megatron_mup",
        iteration=finished,
        model=_said(record["config"]["model"]),
        parameters=_elements(run.model.shape),
        parameterization=_said(record["config"]["parameterization"]),
        multipliers=asdict(run.table.multipliers),
        layout={name: getattr(run.parallel, name) for name in _LAYOUT},
        optimizer={"name": run.optimizer.optimizer.value, "state": kinds} if kinds else {},
        dtypes=_dtypes(groups),
        groups=groups,
        provenance=record.get("provenance", {}),
        problems=tuple(problems),
        checked="sha256" if check else "sizes",
    )


def _inspect_huggingface(folder: Path, *, check: bool) -> Inspection:
    path = folder / CONFIG_FILE
    hf_format, model, multipliers = read_config(read_json(path), str(path))
    problems: list[str] = []
    tensors = HuggingFaceFolder(folder, problems=problems)
    expected = {tensor.name: tensor for tensor in hf_tensors(hf_format, model)}
    problems += _misfits(tensors, expected)
    listed = check and has_checksums(folder)
    if listed:
        problems += _changed(folder)
    if check:
        problems += _unreadable(tensors)
    stored = stored_model(hf_format, model)
    logical = {tensor.name: tensor.role.value for tensor in logical_tensors(stored.shape)}
    roles = {name: logical[tensor.logical] for name, tensor in expected.items()}
    groups = tuple(_huggingface_groups(tensors, roles))
    return Inspection(
        folder=folder,
        kind=hf_format.value,
        model=_said(asdict(model)),
        parameters=_elements(model.shape),
        multipliers=asdict(multipliers),
        dtypes=_dtypes(groups),
        groups=groups,
        problems=tuple(problems),
        checked="sha256 and values" if listed else "values" if check else "headers",
    )


def _said(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options that have a value, as plain data."""
    return {k: getattr(v, "value", v) for k, v in options.items() if v is not None}


def _elements(shape: ModelShape) -> int:
    return sum(math.prod(tensor.shape) for tensor in logical_tensors(shape))


def _dtypes(groups: Iterable[TensorGroup]) -> tuple[str, ...]:
    return tuple(sorted({g.dtype for g in groups if not g.role.startswith("optimizer")}))


def _is_optimizer(key: str) -> bool:
    return key.startswith(OPTIMIZER_PREFIX)


def _megatron_groups(stored: StoredTensors, shape: ModelShape) -> Iterable[TensorGroup]:
    roles: dict[str, list[str]] = {}
    stacked = set()
    for tensor in logical_tensors(shape):
        place = place_of(tensor, shape)
        known = roles.setdefault(place.key, [])
        known += [] if tensor.role.value in known else [tensor.role.value]
        if place.layer is not None:
            stacked.add(place.key)
    for key in sorted(stored.tensors, key=lambda key: (_is_optimizer(key), key)):
        found = stored.tensors[key]
        kind, _, base = key.removeprefix(OPTIMIZER_PREFIX).partition(".")
        name = base if _is_optimizer(key) else key
        layers = found.shape[0] if name in stacked else 1
        role = f"optimizer {kind}" if _is_optimizer(key) else "+".join(roles.get(key, ["other"]))
        yield TensorGroup(
            name=key,
            role=role,
            count=layers,
            shape=found.shape[1:] if name in stacked else found.shape,
            dtype=str(found.dtype).removeprefix("torch."),
            nbytes=found.nbytes,
        )


def _problems(folder: Path, stored: StoredTensors, *, check: bool) -> list[str]:
    if not (folder / CHECKSUMS).exists():
        return [f"{folder / CHECKSUMS} is missing: nobody can tell whether the files are whole."]
    if check:
        return [stored.explain(problem) for problem in check_files(folder)]
    problems = []
    for name, digest in read_checksums(folder).items():
        try:
            size = (folder / name).stat().st_size
        except OSError as error:
            problems.append(f"{folder / name} cannot be read ({error.strerror}).")
            continue
        if size != digest.bytes:
            problems.append(f"{folder / name} has {size} bytes instead of {digest.bytes}.")
    return problems


def _misfits(folder: HuggingFaceFolder, expected: Mapping[str, HfTensor]) -> list[str]:
    """What config.json asks for and the files have not."""
    where = folder.folder
    missing = [name for name in expected if name not in folder.files]
    found = []
    if missing:
        found.append(f"{where} lacks {several(missing)}, which its {CONFIG_FILE} asks for.")
    for name, file in folder.files.items():
        shape = file.tensors[name].shape
        if name in expected and shape != expected[name].shape:
            found.append(
                f"{file.path}: {name} has shape {list(shape)} and {CONFIG_FILE} asks for "
                f"{list(expected[name].shape)}."
            )
    return found


def _changed(folder: Path) -> list[str]:
    """Weight files that are not those of the export; reads all of them."""
    try:
        return changed_weights(folder)
    except CheckpointError as error:
        return [f"{error}."]


def _unreadable(folder: HuggingFaceFolder) -> list[str]:
    """Tensors that cannot be read, or hold what is no number; reads all of them."""
    found = []
    for name, file in folder.files.items():
        try:
            values = file.read(name)
        except CheckpointError as error:
            found.append(f"{error}.")
            continue
        if not all_finite(values):
            found.append(f"{file.path}: {name} is not finite.")
    return found


def _huggingface_groups(
    folder: HuggingFaceFolder, roles: Mapping[str, str]
) -> Iterable[TensorGroup]:
    """Tensors of the safetensors files, by the headers."""
    found: dict[tuple[str, str, Sizes, str], list[int]] = {}
    for name, file in folder.files.items():
        stored = file.tensors[name]
        role = roles.get(name, "other")
        kind = (_LAYER.sub(".layers.*.", name), role, stored.shape, stored.dtype)
        found.setdefault(kind, []).append(stored.end - stored.begin)
    for (name, role, shape, dtype), sizes in found.items():
        told = str(DTYPES[dtype]).removeprefix("torch.") if dtype in DTYPES else dtype
        yield TensorGroup(
            name=name, role=role, count=len(sizes), shape=shape, dtype=told, nbytes=sum(sizes)
        )
