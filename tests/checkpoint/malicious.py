"""Objects whose unpickling runs code, for tests that show that it does not."""

from __future__ import annotations

import collections
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

KINDS = ["posix.system", "builtins.eval", "builtins.getattr", "nested"]


class Reduced:
    """Pickles as a call of ``function`` with ``arguments``."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


class Marker:
    """A file that only running code can make."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def payload(self, kind: str) -> Any:
        """An object whose unpickling makes the file."""
        by_shell = Reduced(os.system, f"touch {self.path}")
        if kind == "posix.system":
            return by_shell
        if kind == "builtins.eval":
            return Reduced(eval, f"open({str(self.path)!r}, 'w')")
        if kind == "builtins.getattr":
            return Reduced(getattr, "text", "upper")
        # An allowed class or function around what is not.
        return collections.OrderedDict(a=[by_shell, torch.Size((2,))])

    @staticmethod
    def refused(kind: str) -> str:
        """The global that the message has to name."""
        return "posix.system" if kind == "nested" else kind


def saved(value: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, **options)
    return stream.getvalue()
