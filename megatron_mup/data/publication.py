"""Publication of finished files: nothing incomplete is ever seen under a final name.

A file is written under a temporary name in the target's own folder (a rename is atomic only inside
one filesystem), synced to disk, and only then renamed.
"""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from megatron_mup.errors import DataError


def check_writable(targets: list[Path], *, overwrite: bool, option: str) -> None:
    """Refuse an output that could not be published, before any expensive work.

    Args:
        targets: Final names of the files to come.
        overwrite: Whether existing targets may be replaced.
        option: The command-line option that named the output; for the message.

    Raises:
        DataError: A target exists and ``overwrite`` is false, or its folder cannot be written.
    """
    # lexists, so that a broken link counts: the rename would replace it.
    existing = [target for target in targets if os.path.lexists(target)]
    if existing and not overwrite:
        names = ", ".join(str(target) for target in existing[:3])
        if len(existing) > 3:
            names += f" and {len(existing) - 3} more"
        raise DataError(f"output exists: {names}; pass --overwrite or another {option}")
    folders = [target for target in targets if target.is_dir()]
    if folders:
        raise DataError(f"output {folders[0]} is a folder; pass another {option}")
    for folder in sorted({target.parent for target in targets}):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # A file is really made: permission bits say nothing of root and of read-only disks.
            probe = temporary_name(folder / "write-probe")
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise DataError(
                f"cannot write to the folder {folder} of {option}: {error.strerror or error}; "
                f"pass a {option} in a writable folder"
            ) from error


def temporary_name(target: Path) -> Path:
    """Return the hidden name, beside ``target``, that it has until it is published."""
    # Machines that share the folder may have equal process numbers.
    return target.with_name(f".{target.name}.{platform.node()}.{os.getpid()}.tmp")


def sync_stream(stream: BinaryIO) -> None:
    """Flush ``stream`` and wait until the disk holds its bytes."""
    stream.flush()
    os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the disk holds the renames made in ``folder``."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def published(target: Path, *, synced: bool = True) -> Iterator[BinaryIO]:
    """Open a file for writing that appears under its name only when the block succeeds.

    Args:
        target: The final name; an existing file is replaced.
        synced: Wait for the disk. Without it a machine that goes down can leave a file that is
            cut, which its reader must be able to tell.

    Yields:
        The binary stream to write to. If the block raises, the temporary file is removed and
        ``target`` stays as it was.
    """
    temporary = temporary_name(target)
    try:
        with temporary.open("wb") as stream:
            yield stream
            # Before the rename: some filesystems otherwise keep the new name and lose the bytes.
            if synced:
                sync_stream(stream)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    if synced:
        sync_folder(target.parent)


@contextlib.contextmanager
def explained_failure(target: Path, option: str) -> Iterator[None]:
    """Turn the system's refusal to write an output, say of a full disk, into a user's error.

    Args:
        target: The output.
        option: The command-line option that names it.

    Yields:
        None; the block writes the output.

    Raises:
        DataError: The block raised OSError.
    """
    try:
        yield
    except OSError as error:
        raise DataError(
            f"cannot write {target}: {error.strerror or error}; free space, or pass a {option} "
            "elsewhere, and run the command again"
        ) from error


def publish_text(target: Path, text: str) -> None:
    """Write a text file that appears under its name only when it is complete.

    Args:
        target: The final name; an existing file is replaced.
        text: The contents, written as UTF-8.
    """
    with published(target) as stream:
        stream.write(text.encode("utf-8"))
