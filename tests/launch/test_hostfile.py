"""The proof of launch/hostfile.sh across two hosts that have only a cable and ssh between them."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.harness.launched import LAUNCH, PATIENCE, TinyRun, alive, finish, started, wait_until
from tests.harness.processes import HANG_SECONDS

from .two_hosts import TwoHosts

pytestmark = pytest.mark.slow


@pytest.fixture
def command(hosts: TwoHosts) -> list[str]:
    return hosts.on(0, "bash", str(LAUNCH / "hostfile.sh"))


@pytest.fixture
def env(hosts: TwoHosts, tmp_path: Path) -> dict[str, str]:
    (tmp_path / "hosts").write_text("# two hosts\n" + "".join(f"{name} slots=1\n" for name in hosts.addresses))
    # Half a minute until ssh gives a host up is long for a test.
    ssh = "-oServerAliveInterval=2 -oServerAliveCountMax=2"
    return hosts.env | {"HOSTFILE": str(tmp_path / "hosts"), "PDSH_SSH_ARGS_APPEND": ssh}


def test_two_hosts_stop_on_request_and_by_a_pulled_cable_and_go_on(
    hosts: TwoHosts, command: list[str], env: dict[str, str], store: Path, plain: TinyRun, tmp_path: Path
) -> None:
    run, log = TinyRun(tmp_path, store), tmp_path / "log"
    with started(command, run, log, env) as process:
        run.wait_for_update(1, log.read_text)
        ranks = run.ranks()
        assert len(ranks) == 2
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 85, log.read_text()
        assert not alive(ranks)
    stopped = run.update()
    assert run.checkpoints() == [stopped] and stopped < run.updates
    assert "[INFO]" not in log.read_text()

    run = TinyRun(tmp_path, store, save_every=5, hang_seconds=HANG_SECONDS)
    with started(command, run, log, env) as process:
        wait_until(lambda: run.checkpoints()[-1] > stopped, "a newer checkpoint", log.read_text)
        ranks = run.ranks()
        assert len(ranks) == 2
        hosts.cable(plugged=False)
        try:
            assert process.wait(PATIENCE) not in (0, 2, 85), log.read_text()
            wait_until(lambda: not alive(ranks), "the end of the ranks of both hosts", log.read_text)
        finally:
            hosts.cable(plugged=True)
    assert f"resuming from {run.dir}/checkpoints/step-{stopped:08d}" in log.read_text()
    assert "[rank 0 on host-0] ranks that do not answer" in log.read_text()
    assert f"no progress for {HANG_SECONDS} s" in log.read_text()
    saved = run.checkpoints()[-1]
    assert saved < run.updates

    assert finish(command, run, log, env) == 0, log.read_text()
    assert f"resuming from {run.dir}/checkpoints/step-{saved:08d}" in log.read_text()
    assert run.lines() == plain.lines()


def test_a_host_that_is_cut_off_is_named_by_the_other(
    hosts: TwoHosts, command: list[str], env: dict[str, str], store: Path, tmp_path: Path
) -> None:
    """By the heartbeats: no time-out of a backend and no watchdog comes before them."""
    run, log = TinyRun(tmp_path, store, updates=100_000, hang_seconds=10_000, lost_seconds=8), tmp_path / "log"
    with started(command, run, log, env):
        run.wait_for_update(3, log.read_text)
        ranks = run.ranks()
        hosts.cable(plugged=False)
        try:
            wait_until(lambda: not alive(ranks), "the end of the ranks of both hosts", log.read_text)
        finally:
            hosts.cable(plugged=True)
    lost = "[rank 0 on host-0] lost contact with another rank, stopping: rank 1 on host-1 does not answer"
    assert f"{lost}: its host is gone or cut off" in log.read_text()
