from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, check_installed
from tests.slurm.slurm_conf import Layout


@pytest.fixture(scope="session")
def installed_slurm() -> None:
    """Fails with what to install: a level that was asked for is not passed over in silence."""
    try:
        check_installed()
    except RuntimeError as error:
        pytest.fail(str(error), pytrace=False)


@pytest.fixture(scope="session")
def cluster(installed_slurm: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two live nodes, and 16 planned ones for ``sbatch --test-only``."""
    with Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def wide_cluster(
    installed_slurm: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    """Sixteen live nodes of eight GPUs."""
    with Cluster(tmp_path_factory.mktemp("wide"), Layout(nodes=16, planned_nodes=0)) as cluster:
        yield cluster
