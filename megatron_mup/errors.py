"""Errors that a user can act on.

Every error raised on purpose derives from ``MupError`` and its message says what is wrong, with the
offending values and their units, and how to mend it (the option's name). The command line prints
the message without a traceback and exits with ``MupError.exit_code``. Anything else that escapes is
a defect of this package.
"""

from __future__ import annotations

from megatron_mup import exit_codes


class MupError(Exception):
    """Base of all errors that are the user's to mend."""

    exit_code: int = exit_codes.USER_ERROR


class ConfigError(MupError):
    """An option is unknown, has a wrong type or value, or contradicts another option."""


class ParameterizationError(MupError):
    """The rule table has no answer: no base shape, no role, a refused variant."""


class DataError(MupError):
    """Text, tokenizer or token shards are missing, damaged or do not fit the model."""


class CheckpointError(MupError):
    """A checkpoint is missing, damaged or belongs to another parameterization or model."""


class InstallationError(MupError):
    """The environment lacks something that was asked for (a package, a kernel, a device)."""


class PeerLostError(MupError):
    """Another rank of the job died or hung, so this one cannot go on."""

    exit_code: int = exit_codes.LOST_PEERS
