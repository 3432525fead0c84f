"""Megatron's index cache, looked through before Megatron opens it.

megatron-core 0.19.2 opens the ``.npy`` files of its cache with ``allow_pickle=True`` and takes any
file that is there for a finished one, although ``numpy.save`` writes under the final name. So a
file that is no plain array is refused, and one that was cut by a kill is removed to be built again;
a lock keeps that from hitting a file that another job is writing at this moment.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path

from numpy.lib import format as npy

from megatron_mup.errors import DataError

logger = logging.getLogger(__name__)

LOCK = ".lock"
_LARGEST_HEADER_BYTES = 10_000
"""NumPy's own limit; an index's header has about 100."""


@contextlib.contextmanager
def guarded_cache(folder: Path, *, builds: bool) -> Iterator[None]:
    """Check the cache and, on the rank that builds it, keep other jobs out meanwhile.

    Args:
        folder: Megatron's ``path_to_cache``; may be missing.
        builds: whether this rank builds missing files; the others wait for it inside Megatron.

    Raises:
        DataError: a file holds something else than a plain array.
    """
    with _locked(folder) if builds else contextlib.nullcontext():
        check_cache(folder, remove_cut=builds)
        yield


def check_cache(folder: Path, *, remove_cut: bool) -> None:
    """Refuse what is no plain array, and remove what a killed run left unfinished.

    Args:
        folder: the cache; may be missing.
        remove_cut: delete cut files; otherwise they are left to the rank that does.

    Raises:
        DataError: an array of objects, or no array at all: reading it could run code.
    """
    for path in sorted(folder.glob("*.npy")):
        try:
            whole = _is_whole(path)
        # A malformed header can raise anything, up to RecursionError.
        except Exception as error:
            # The rank that builds takes cut files away while the others look.
            if not os.path.lexists(path):
                continue
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise DataError(
                f"{path}: not an index that Megatron wrote ({reason}), and reading it could run "
                "code; delete it, or set data.data_cache_path to a folder of your own"
            ) from error
        if not whole and remove_cut:
            logger.warning("%s was cut by a killed run and is built again", path)
            path.unlink()


def _is_whole(path: Path) -> bool:
    """Whether a file is complete; ValueError if it could never become a plain array."""
    if not path.is_file():
        raise ValueError("not a file")
    size = path.stat().st_size
    with path.open("rb") as stream:
        magic = stream.read(npy.MAGIC_LEN)
        prefix = len(npy.MAGIC_PREFIX)
        if magic[:prefix] != npy.MAGIC_PREFIX[: len(magic)]:
            raise ValueError("no NumPy array")
        if len(magic) < npy.MAGIC_LEN:
            return False
        # numpy.save writes version 1.0 for every type that an index has.
        if magic[prefix:] != b"\x01\x00":
            raise ValueError("no NumPy array of version 1.0")
        header = stream.read(2)
        if len(header) < 2 or size < stream.tell() + int.from_bytes(header, "little"):
            return False
        stream.seek(-2, 1)
        shape, _, dtype = npy.read_array_header_1_0(stream, max_header_size=_LARGEST_HEADER_BYTES)
        if dtype.hasobject or dtype.kind not in "iuf":
            raise ValueError(f"an array of {dtype}")
        if any(length < 0 for length in shape):
            raise ValueError(f"an array of shape {shape}")
        return size >= stream.tell() + math.prod(shape) * dtype.itemsize


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the cache's lock; the kernel gives it back when the process dies.

    A folder that cannot be written to holds finished files only, and a filesystem without locks is
    used without one, as Megatron does.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context((folder / LOCK).open("ab"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.warning("waiting for another job that builds indexes in %s", folder)
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield
