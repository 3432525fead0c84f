"""What must never reach a run folder, and how it is taken out of text.

Three nets, each with holes of its own: names (a variable called ``WANDB_API_KEY``, a file called
``.netrc``), shapes (tokens of known services, ``user:password@`` in an address, private keys), and
values (whatever a variable of such a name holds in this process's environment, wherever it turns
up). Must not import torch or megatron.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

MASK = "***"

_WORDS = (
    r"key|token(?!iz|s\b)|secret|passw(?:or)?d|passphrase|passcode|pwd|credential|auth(?!or)|bearer|jwt"
    r"|cookie|signature|webhook|private|netrc|dsn|login|(?<![a-z0-9])pat(?![a-z0-9])"
)
_SECRET_NAME = re.compile(_WORDS, re.IGNORECASE)
_HARMLESS_NAMES = frozenset({"PWD", "OLDPWD", "SLURM_SUBMIT_DIR"})

_SECRET_FILE = re.compile(
    r"(^|/)(\.env($|[.\-_/])|env$|\.netrc|_netrc|\.pypirc|\.npmrc|\.git-credentials|\.pgpass"
    r"|\.aws/|\.ssh/|\.kube/|\.docker/|id_(rsa|dsa|ecdsa|ed25519))"
    r"|secret|credential|passw(or)?d|\.(pem|key|p12|pfx|jks|kdbx)$",
    re.IGNORECASE,
)

_SHAPES = (
    # user:password@ and token@ of an address.
    (re.compile(r"(?<=://)[^\s/'\"]+(?=@)"), MASK),
    (
        re.compile(
            r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL
        ),
        MASK,
    ),
    (
        re.compile(
            r"\b(hf_[A-Za-z0-9]{16,}|(sk|pk|rk)-[A-Za-z0-9_\-]{16,}|gh[pousr]_[A-Za-z0-9]{16,}"
            r"|github_pat_\w{16,}|glpat-[\w\-]{16,}|(AKIA|ASIA)[A-Z0-9]{12,}|xox[a-z]-[\w\-]{10,}"
            r"|AIza[\w\-]{30,}|ya29\.[\w\-]{16,}|npm_[A-Za-z0-9]{30,}|pypi-[\w\-]{16,}"
            r"|wandb_v1_[\w\-]{16,}|eyJ[\w\-]{10,}\.[\w\-]{10,}\.[\w\-]*)"
        ),
        MASK,
    ),
    (re.compile(r"\b(Bearer|Basic)\s+[A-Za-z0-9+/_.~\-]{8,}=*", re.IGNORECASE), rf"\1 {MASK}"),
    # machine HOST login NAME password WORD, in one line or several.
    (re.compile(r"^(\W*(?:machine\b.*\b)?password\s+)[^\s=:]\S*", re.MULTILINE), rf"\1{MASK}"),
)
"""Patterns that are no code: they are masked everywhere."""

_NAME = rf"[\w.\-]*(?:{_WORDS})[\w.\-]*"
_VALUE = r"""(?:"[^"\n]*"|'[^'\n]*'|[^\s,;"'#)\]}]+)"""
_ASSIGNED = re.compile(
    rf"""(?P<head>\b(?!KeyError\b){_NAME}["']?\s*(?:=|:)\s*)(?P<value>{_VALUE})""", re.IGNORECASE
)
_BEFORE_VALUE = re.compile(rf"""\b{_NAME}["']?\s*(?:=|:)\s*$""", re.IGNORECASE)
_PASSED = re.compile(rf"(?P<head>--?{_NAME}\s+)(?P<value>{_VALUE})", re.IGNORECASE)
_USER = re.compile(
    r"""(?P<head>(?<!\S)(?:-u\s+|--user[=\s]\s*)["']?[^\s:"'+%]+:)(?P<value>[^\s"']+)"""
)
"""curl's ``-u user:password``."""
_PLAIN = re.compile(
    r"""["']?(-?\d{0,5}(\.\d*)?(e[+\-]?\d+)?|true|false|null|none|yes|no)?["']?""", re.I
)
"""Values that are no secret: small numbers, switches, nothing."""
_LITERAL = re.compile(r"""["'](?=[^"']*\d)(?=[^"']*[A-Za-z])[A-Za-z0-9+/_=\-]{20,}["']""")
"""Values that can only be one: long, quoted, letters and digits."""

SHORTEST_VALUE = 6
"""Characters from which the value of a secret variable is looked for in text."""
SHORTEST_WORD = 10
"""The same for a value of letters only."""


def is_secret_name(name: str) -> bool:
    """Whether the value of a variable of this name must not be shown."""
    return name not in _HARMLESS_NAMES and _SECRET_NAME.search(name) is not None


def is_secret_file(path: str | PurePath) -> bool:
    """Whether a file of this name must not be copied, whatever is in it."""
    return _SECRET_FILE.search(PurePath(path).as_posix()) is not None


def secret_values(environment: Mapping[str, str]) -> list[str]:
    """What the secret variables of an environment hold, longest first.

    Args:
        environment: of this process.
    """
    values = {
        value for name, value in environment.items() if is_secret_name(name) and _is_telling(value)
    }
    return sorted(values, key=len, reverse=True)


def _is_telling(value: str) -> bool:
    """Whether a value is worth looking for: a number or a common word would hit everything."""
    if _PLAIN.fullmatch(value):
        return False
    return len(value) >= (SHORTEST_WORD if value.isalpha() else SHORTEST_VALUE)


def mask_code(text: str, values: list[str]) -> str:
    """Mask what can be nothing but a secret; names of variables alone are code.

    Args:
        text: of a source file.
        values: from ``secret_values``.
    """
    return _LITERAL.sub(_mask_literal, _mask_shapes(text, values))


def mask_text(text: str, values: list[str]) -> str:
    """Mask whatever could be a secret, at the cost of some values that are none.

    Args:
        text: scripts, configurations, differences, messages.
        values: from ``secret_values``.
    """
    text = _mask_shapes(text, values)
    for pattern in (_ASSIGNED, _PASSED, _USER):
        text = pattern.sub(_mask_value, text)
    return text


def mask_data(data: Any, values: list[str]) -> Any:
    """Mask all text in plain data, and whatever stands under a name that sounds like a secret.

    Args:
        data: mappings, sequences, text, numbers.
        values: from ``secret_values``.
    """
    if isinstance(data, str):
        return mask_text(data, values)
    if isinstance(data, Mapping):
        return {
            key: MASK
            if isinstance(value, str) and is_secret_name(str(key))
            else mask_data(value, values)
            for key, value in data.items()
        }
    if isinstance(data, list | tuple):
        return [mask_data(value, values) for value in data]
    return data


def _mask_shapes(text: str, values: list[str]) -> str:
    for value in values:
        text = text.replace(value, MASK)
    for pattern, replacement in _SHAPES:
        text = pattern.sub(replacement, text)
    return text


def _mask_value(match: re.Match[str]) -> str:
    value = match["value"]
    # A reference to a variable shows nothing.
    if _PLAIN.fullmatch(value) or value.startswith(("$", '"$', "'$")) or MASK in value:
        return match[0]
    return f"{match['head']}{MASK}"


def _mask_literal(match: re.Match[str]) -> str:
    start = match.string.rfind("\n", 0, match.start()) + 1
    assigned = _BEFORE_VALUE.search(match.string[start : match.start()])
    return MASK if assigned else match[0]
