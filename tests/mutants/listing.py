"""The list of mutants, read from ``mutants.yaml`` and checked as far as reading can."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
LIST = Path(__file__).with_name("mutants.yaml")


@dataclass(frozen=True)
class Mutant:
    """One broken version of the package: an exact text in one file, replaced.

    Attributes:
        name: short and unique.
        breaks: what is true of the package and not of the mutant.
        file: path below the root of the tree.
        old: text that occurs in it once.
        new: what stands there instead.
        seen_by: pytest node ids, with or without parameters; each must fail.
    """

    name: str
    breaks: str
    file: str
    old: str
    new: str
    seen_by: tuple[str, ...]

    def applied(self, text: str) -> str:
        """The file's text, mutated.

        Raises:
            LookupError: the old text does not occur, or more than once.
        """
        count = text.count(self.old)
        if count != 1:
            raise LookupError(f"'{self.name}': its old text occurs {count} times in {self.file}")
        return text.replace(self.old, self.new)


def read_mutants() -> list[Mutant]:
    """All mutants, in the order of the file."""
    entries = yaml.safe_load(LIST.read_text(encoding="utf-8"))
    return [Mutant(**{**entry, "seen_by": tuple(entry["seen_by"])}) for entry in entries]
