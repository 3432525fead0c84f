"""Packages of the lock's section ``partial``: some tests need them, and no extra installs them."""

from __future__ import annotations

from importlib import util
from pathlib import Path

import pytest


def installed(name: str) -> Path:
    """The folder of a package, which is not imported; without it the test fails and says why."""
    spec = util.find_spec(name)
    if spec is None or spec.origin is None:
        pytest.fail(
            f"{name} is not installed: 'make venv' makes an environment with every package that "
            "the tests need, the extra 'dev' leaves this one out (requirements.lock, [partial])",
            pytrace=False,
        )
    return Path(spec.origin).parent
