"""Shell text to Megatron-LM flags with typed values.

Owns quoting, comments, line continuations, the launcher in front, and what a malformed value says;
knows no flag by name.
"""

from __future__ import annotations

import re
import shlex
from typing import Any

from megatron_mup.errors import ConfigError

_EXPECTED: dict[type, str] = {
    bool: "no value",
    list: "one or more values",
    int: "an integer",
    float: "a number",
    str: "a value",
}


class Flags:
    """The flags of a command line that nobody has accounted for yet.

    Args:
        text: shell text without variables.

    Attributes:
        given: flag without dashes -> its words, in the order of the command line.
        notes: lines on what the text holds besides flags.

    Raises:
        ConfigError: not shell text, an unexpanded variable, or a word that belongs to no flag.
    """

    def __init__(self, text: str) -> None:
        self.given, self.notes = _group(_words(text))

    def take(self, flag: str, kind: type) -> Any:
        """Account for one flag.

        Args:
            flag: name without dashes.
            kind: ``bool`` for a switch, ``list`` for one or more words, else the value's type.

        Returns:
            None when the flag is not given, True for a switch, a list of words, or the value.

        Raises:
            ConfigError: too many or too few words, or a word of another type.
        """
        values = self.given.pop(flag, None)
        if values is None:
            return None
        # A list takes any number of words but none at all.
        if len(values) != {bool: 0, list: max(1, len(values))}.get(kind, 1):
            found = f"is followed by {values}" if values else "nothing follows"
            raise ConfigError(f"--{flag} takes {_EXPECTED[kind]}, but {found}")
        if kind is bool:
            return True
        return values if kind is list else self.convert(flag, values[0], kind)

    @staticmethod
    def convert(flag: str, text: str, kind: type) -> Any:
        """The value of one word.

        Args:
            flag: name without dashes, for the message.
            text: the word.
            kind: int, float or str.

        Raises:
            ConfigError: the word is not of that type.
        """
        try:
            return kind(text)
        except ValueError as error:
            raise ConfigError(
                f"--{flag} takes {_EXPECTED[kind]}, not '{text}'; correct the command line"
            ) from error


def _words(text: str) -> list[str]:
    """Split shell text; comments go first, because a continued line may end in one."""
    # Only at a word's start, as in a shell: "a#b" is a value.
    without_comments = re.sub(r"(?m)(^|[ \t])#.*$", "", text)
    try:
        words = shlex.split(re.sub(r"\\\s*\n", " ", without_comments))
    except ValueError as error:
        raise ConfigError(
            f"the Megatron command line is not shell text ({error}); close its quotes"
        ) from error
    for word in words:
        # Expanding it here would take this machine's environment for that of the original run.
        if "$" in word:
            raise ConfigError(
                f"'{word}' holds a shell variable; write its value (print the expanded command "
                "line with echo)"
            )
    return words


def _group(words: list[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Flags with their values, and notes on the words in front of the flags.

    Raises:
        ConfigError: a word that belongs to no flag.
    """
    notes = []
    # The last one: a launcher may itself be given a path that looks like a script.
    script = [number for number, word in enumerate(words) if re.search(r"pretrain_\w+\.py$", word)]
    if script:
        launcher, words = words[: script[-1] + 1], words[script[-1] + 1 :]
        notes.append(
            f"'{' '.join(launcher)}': launcher and script are no configuration; use the same "
            "launcher with -m megatron_mup train --config FILE"
        )
    given: dict[str, list[str]] = {}
    flag = None
    for word in words:
        if word.startswith("--"):
            flag, separator, value = word.removeprefix("--").partition("=")
            if flag in given:
                notes.append(f"--{flag} is given twice: the last one counts, as in Megatron")
            given[flag] = [value] if separator else []
        elif flag is None:
            raise ConfigError(
                f"'{word}' is not an option; give the flags that follow pretrain_gpt.py"
            )
        else:
            given[flag].append(word)
    return given, notes
