"""Names of a campaign's stages. Imports nothing of the package: the command line lists them."""

from __future__ import annotations

from enum import StrEnum


class Stage(StrEnum):
    """In order."""

    COORDINATE_CHECK = "coordinate_check"
    SWEEP = "sweep"
    FIT = "fit"
    GATE = "gate"
    TARGET = "target"
