"""``megatron-mup sweep`` that trains nothing and looks into no shards: seconds without torch."""

from __future__ import annotations

from megatron_mup.cli import main
from megatron_mup.transfer.sweep import pool, session
from tests.transfer.sweep import fake_worker


def no_data(*_arguments: object, **_options: object) -> None:
    """Stands in for what imports torch."""


if __name__ == "__main__":
    pool._WORKER = fake_worker.__name__
    session.prepare_data = no_data
    main()
