"""Write any source of weights as a checkpoint of this package, for any layout.

Only weights are written. A run starts from them with ``checkpoint.finetune=true``: its optimizer,
schedule and counters are fresh. In a bf16 run the stored weights are bf16, and where the source
has more digits the fp32 values are stored beside them, under the names of main weights, so that
nothing that was converted is lost to the next conversion.

Streams: one logical tensor and its cast are in memory at a time, or the cast of the one before,
which is written meanwhile. Query, key and value of a layer, which Megatron keeps in one tensor, are
written as separate boxes of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from megatron_mup.checkpoint.contents import CHECKPOINT_VERSION
from megatron_mup.checkpoint.folders import (
    TRACKER,
    read_record,
    usable_iterations,
    write_tracker,
)
from megatron_mup.checkpoint.integrity import checkpoint_folder
from megatron_mup.checkpoint.record import WEIGHTS_ONLY, make_record
from megatron_mup.checkpoint.upstream_args import upstream_args
from megatron_mup.config import RunConfig
from megatron_mup.convert.published_folder import (
    Output,
    Target,
    check_room,
    is_rejected,
    published_folder,
)
from megatron_mup.convert.rescaling import RescaledWeights
from megatron_mup.convert.stored_places import (
    COMMON_STATE,
    MAIN_WEIGHT,
    Place,
    extra_state_keys,
    place_of,
    unlearned_gains,
)
from megatron_mup.convert.tensor_files import TensorFiles
from megatron_mup.convert.weights import WeightSource
from megatron_mup.errors import CheckpointError
from megatron_mup.parameterization.roles import LogicalTensor, logical_tensors

CONVERTED_FROM = "converted_from"
RESHARDED_FROM = "resharded_from"
"""Keys in the provenance of a record that no run of its own has."""

_COMPARED = 1 << 18
"""Elements that are compared at once."""


def write_megatron(
    source: WeightSource,
    root: Path,
    *,
    run: RunConfig,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
    approve: Callable[[Path], bool] | None = None,
) -> Path:
    """Write a checkpoint with the weights of a source.

    Args:
        source: of the run's model and multipliers; ``RescaledWeights`` makes one of any other.
        root: the folder for ``checkpoint.load``; made if missing.
        run: the configuration that the record holds.
        overwrite: replace an earlier conversion.
        progress: called with the bytes of weights written so far and in all, without main weights.
        approve: called with the complete folder before it gets its name; see ``published_folder``.

    Returns:
        The finished ``iter_0000000`` folder; ``is_rejected`` tells whether it was approved.

    Raises:
        CheckpointError: the source is of another model or has other multipliers, a tensor cannot
            be read, or the folder holds other checkpoints or cannot be written.
    """
    target = prepare_root(root, 0, overwrite=overwrite, source=Path(source.where))
    source = _checked(source, run)
    origin = {CONVERTED_FROM: source.where, "source": dict(source.provenance)}
    record = make_record(run, provenance=origin)
    with published_folder(target, approve=approve) as output, TensorFiles(output.hidden) as files:
        with _Writer(source, run, files, target.folder) as writer:
            writer.write(output.hidden, progress)
        _add_objects(files, run)
        files.finish({**record, "contents": WEIGHTS_ONLY})
    name_newest(output, 0)
    return output.folder


def prepare_root(
    root: Path, iteration: int, *, overwrite: bool, source: Path | None = None
) -> Target:
    """The folder of a checkpoint to come, after everything that forbids it was looked at.

    Args:
        root: the run's folder; may be missing.
        iteration: the checkpoint's.
        overwrite: replace an earlier conversion of this iteration.
        source: what is read, if it is a folder.

    Raises:
        CheckpointError: the folder holds other checkpoints, or this one, or is the source's.
    """
    folder = checkpoint_folder(root, iteration)
    target = Target(folder=folder, ours=_is_converted, overwrite=overwrite, source=source)
    target.check()
    paths = sorted(root.glob("iter_*")) if root.is_dir() else []
    held = [path.name for path in paths if path != folder and not is_rejected(path)]
    if held:
        # A run would load the newest of them, whatever was converted.
        raise CheckpointError(
            f"{root} already holds {', '.join(held[:3])}, whole iterations "
            f"{usable_iterations(root)}; write to a folder of its own"
        )
    return target


def name_newest(output: Output, iteration: int) -> None:
    """Name an approved checkpoint for Megatron's tools.

    Raises:
        CheckpointError: that cannot be written; the checkpoint is there.
    """
    folder = output.folder
    if is_rejected(folder):
        return
    try:
        write_tracker(folder.parent, iteration)
    except OSError as error:
        raise CheckpointError(
            f"{folder} is complete, but {folder.parent / TRACKER}, which names it for Megatron's "
            f"tools, cannot be written: {error.strerror or error}"
        ) from error


def _is_converted(folder: Path) -> bool:
    """Whether a checkpoint was converted or resharded; a run's own is never replaced."""
    try:
        origin = read_record(folder).get("provenance")
    except CheckpointError:
        return False
    return isinstance(origin, dict) and bool(origin.keys() & {CONVERTED_FROM, RESHARDED_FROM})


class _Writer:
    """One pass over the source's tensors."""

    def __init__(
        self, source: WeightSource, run: RunConfig, files: TensorFiles, folder: Path
    ) -> None:
        self._source, self._files, self._folder = source, files, folder
        self._shape = run.model.shape
        self._dtype = torch.bfloat16 if run.precision.bf16 else torch.float32
        self._tensors = logical_tensors(self._shape)
        self._elements = sum(math.prod(tensor.shape) for tensor in self._tensors)
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="write")
        self._running: Future[None] | None = None

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def write(self, hidden: Path, progress: Callable[[int, int], None] | None) -> None:
        """Write all weights, and fp32 main weights if any of them says more than its weight."""
        without_main: list[LogicalTensor] = []
        more_digits, done = False, 0
        self._check_room(hidden, self._elements * self._dtype.itemsize)
        for tensor in self._tensors:
            values = self._read(tensor)
            # Never two rounded tensors beside an fp32 one.
            self._wait()
            weight = values.to(self._dtype)
            if not more_digits and not _same(weight, values):
                more_digits = True
                rest = self._elements - done
                self._check_room(hidden, rest * self._dtype.itemsize + 4 * self._elements)
            if more_digits:
                self._add("", tensor, weight)
                self._add(MAIN_WEIGHT, tensor, values.float())
            else:
                without_main.append(tensor)
                self._add_meanwhile(tensor, weight)
            del weight, values
            done += math.prod(tensor.shape)
            if progress is not None:
                progress(self._dtype.itemsize * done, self._dtype.itemsize * self._elements)
        self._wait()
        # Main weights are stored for all tensors or for none.
        for tensor in without_main if more_digits else ():
            self._add(MAIN_WEIGHT, tensor, self._read(tensor).float())
        for gain in unlearned_gains(self._shape):
            self._add("", gain, torch.ones(gain.shape, dtype=self._dtype))

    def _add_meanwhile(self, tensor: LogicalTensor, weight: Tensor) -> None:
        """Write a weight while the next one is read, if it takes half of that one's memory."""
        if weight.element_size() > 2:
            self._add("", tensor, weight)
            return
        self._running = self._pool.submit(self._add, "", tensor, weight)

    def _wait(self) -> None:
        """Wait until what was handed over is written, and raise its error."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def _check_room(self, hidden: Path, needed: int) -> None:
        advice = "make room or choose another disk"
        check_room(hidden, needed, folder=self._folder, advice=advice)

    def _read(self, tensor: LogicalTensor) -> Tensor:
        values = self._source.read(tensor.name)
        if values.shape != tensor.shape:
            raise CheckpointError(
                f"{self._source.where}: {tensor.name} has shape {list(values.shape)} instead of "
                f"{list(tensor.shape)}"
            )
        return values

    def _add(self, prefix: str, tensor: LogicalTensor, values: Tensor) -> None:
        place = place_of(tensor, self._shape)
        for rows in place.rows:
            block = values[rows.first : rows.first + rows.count]
            self._files.add(prefix + place.key, place.shape, rows.offset, _stacked(place, block))


def _stacked(place: Place, block: Tensor) -> Tensor:
    return block if place.layer is None else block.unsqueeze(0)


def _same(weight: Tensor, values: Tensor) -> bool:
    """Whether a cast lost nothing; in blocks, so that no second fp32 tensor is made."""
    if weight.dtype == values.dtype:
        return True
    count = math.ceil(values.numel() / _COMPARED)
    blocks = zip(weight.view(-1).chunk(count), values.view(-1).chunk(count), strict=True)
    # NaN is not equal to itself, and then more digits are kept than needed.
    return all(torch.equal(cast.float(), exact.float()) for cast, exact in blocks)


def _add_objects(files: TensorFiles, run: RunConfig) -> None:
    for key in extra_state_keys(run.model.shape):
        files.add_object(key, None)
    files.add_object(
        COMMON_STATE,
        {
            "checkpoint_version": CHECKPOINT_VERSION,
            "iteration": 0,
            "consumed_train_samples": 0,
            "skipped_iterations": 0,
            "health": {},
            "args": upstream_args(run),
        },
    )


def _checked(source: WeightSource, run: RunConfig) -> WeightSource:
    """The source, if it is of the run's model and multipliers."""
    if source.multipliers != run.table.multipliers:
        raise CheckpointError(
            f"the weights of {source.where} belong to {source.multipliers}, but the run's "
            f"parameterization has {run.table.multipliers}; rescale the weights first"
        )
    # Between equal multipliers nothing is rescaled, and another architecture is refused.
    return RescaledWeights(source, run.model, source.multipliers)
