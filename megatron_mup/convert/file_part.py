"""A part of a file that reads like a file.

torch's own view (2.11) seeks beyond the end when asked to seek back from it, as zipfile does.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any


class FilePart(io.RawIOBase):
    """Consecutive bytes of a file, as a file of their own.

    Args:
        path: the file.
        position: of the first byte.
        length: bytes.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path, position: int, length: int) -> None:
        self._file = path.open("rb", buffering=0)
        self._start, self._length, self._at = position, length, 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Move to a byte of the part, also beyond its end."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        if start + offset < 0:
            raise ValueError("seek before the first byte")
        self._at = start + offset
        return self._at

    def tell(self) -> int:
        """The next byte's place in the part."""
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        """Fill a buffer with what follows, at most to the end of the part."""
        view = memoryview(buffer)[: max(0, self._length - self._at)]
        self._file.seek(self._start + self._at)
        count = self._file.readinto(view) or 0
        self._at += count
        return count

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()
