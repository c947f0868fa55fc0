"""The launch tests' fixtures: the store, the run to compare with, the throw-away cluster and hosts."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.launched import TinyRun, finish
from tests.harness.once import made_once
from tests.harness.processes import free_port

from . import slurm_cluster, two_hosts


def require(missing: list[str], packages: str) -> None:
    """Skips the test when a component is missing; with GPTB_DS_REQUIRE_ALL=1 that is a failure."""
    if missing:
        message = f"missing: {', '.join(missing)} (Debian packages: {packages})"
        if os.environ.get("GPTB_DS_REQUIRE_ALL") == "1":
            pytest.fail(message)
        pytest.skip(message)


@pytest.fixture(scope="session")
def plain(store: Path, tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """A run on two ranks that nothing disturbed, started by the bare deepspeed command.

    Its port is given: the launcher's own, 29500, is everybody's who runs tests beside this one.
    """
    command = [
        str(Path(sys.executable).parent / "deepspeed"),
        "--num_accelerators",
        "2",
        "--master_port",
        str(free_port()),
        "--module",
        "gptb_ds",
        "train",
    ]

    def make(folder: Path) -> None:
        run, log = TinyRun(folder, store), folder / "log"
        assert finish(command, run, log, {"DS_ACCELERATOR": "cpu"}) == 0, log.read_text()
        assert run.update() == run.updates

    return TinyRun(made_once(tmp_path_factory, "plain", make), store)


@pytest.fixture(scope="module")
def cluster() -> Iterator[slurm_cluster.SlurmCluster]:
    require(slurm_cluster.missing_programs(), slurm_cluster.PACKAGES)
    # Not pytest's folder: munge's socket lies too deep there, and where other users can't reach it.
    with (
        tempfile.TemporaryDirectory(prefix="slurm-") as folder,
        slurm_cluster.SlurmCluster(Path(folder) / "cluster") as up,
    ):
        yield up


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[two_hosts.TwoHosts]:
    require(two_hosts.missing_programs(), two_hosts.PACKAGES)
    with two_hosts.TwoHosts(tmp_path_factory.mktemp("hosts") / "two") as up:
        yield up
