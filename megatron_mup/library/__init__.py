"""The package as a library: muP for a script that builds its own Megatron-Core model.

``resolve`` is the way in; see docs/library.md. Import it before ``megatron``: without a GPU,
``platform`` must come first.
"""

from megatron_mup import platform

platform.prepare()

from megatron_mup.library.extras import Extras  # noqa: E402  after prepare
from megatron_mup.library.resolved import Mup, resolve  # noqa: E402  after prepare

__all__ = ["Extras", "Mup", "resolve"]
