"""A campaign of which nothing is trained."""

from __future__ import annotations

import pytest

from megatron_mup.transfer.campaign import checking, stages
from tests.transfer.campaign.acting import Acted


@pytest.fixture
def acted(monkeypatch: pytest.MonkeyPatch) -> Acted:
    acted = Acted()
    monkeypatch.setattr(checking, "check_arm", acted.check)
    monkeypatch.setattr(stages, "run_sweep", acted.sweep)
    monkeypatch.setattr(stages, "check_target_data", acted.target_data)
    monkeypatch.setattr(stages, "data_digest", lambda _run: acted.shards)
    monkeypatch.setattr("megatron_mup.transfer.report.build.make_report", acted.report)
    # A row is synced to disk; a table of 63 need not be.
    monkeypatch.setattr("os.fsync", lambda _file: None)
    return acted
