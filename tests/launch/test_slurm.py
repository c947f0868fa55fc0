"""The proof of launch/slurm.sbatch on a real two-node Slurm: time limit, preemption, requeue, faults, chains."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from tests.harness.launched import LAUNCH, TinyRun, environment, wait_until

from .slurm_cluster import SlurmCluster

pytestmark = pytest.mark.slow
TWO_NODES = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0", "--output=job.log"]


class Job:
    """A submitted run and what it says."""

    def __init__(self, cluster: SlurmCluster, run: TinyRun, *options: str, **env: str) -> None:
        self.cluster, self.run, self.folder = cluster, run, run.config.parent
        script = str(LAUNCH / "slurm.sbatch")
        cluster.env = environment() | {"SLURM_CONF": cluster.env["SLURM_CONF"]}
        self.number = cluster.submit(*TWO_NODES, *options, script, *run.arguments, cwd=self.folder, env=env)

    def said(self) -> str:
        logs = "\n".join(p.read_text() for p in self.folder.glob("job.log"))
        return f"{self.cluster.log()}\n== job\n{logs}"

    def wait_for_state(self, state: str, restarts: int) -> None:
        wanted = {"JobState": state, "Restarts": str(restarts)}

        def reached() -> bool:
            job = self.cluster.job(self.number)
            over = job["JobState"] in ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED")
            assert not over or wanted.items() <= job.items(), f"expected {wanted}, got {job}:\n{self.said()}"
            return wanted.items() <= job.items()

        wait_until(reached, f"{state} after {restarts} restarts", self.said)

    def two_ranks(self, after: int) -> list[psutil.Process]:
        """The ranks, once an update after `after` is done."""
        self.run.wait_for_update(after + 1, self.said)
        ranks = self.run.ranks()
        assert len(ranks) == 2, self.said()
        return ranks

    def is_back_in_the_queue(self, restarts: int) -> None:
        """A checkpoint of the last update is there and the job waits; it is started at once."""
        self.wait_for_state("PENDING", restarts)
        assert self.run.checkpoints()[-1:] == [self.run.update()] and self.run.update() < self.run.updates, self.said()
        self.cluster.start_now(self.number)


def test_time_limit_and_preemption_requeue_and_the_run_is_the_plain_one(
    cluster: SlurmCluster, store: Path, plain: TinyRun, tmp_path: Path
) -> None:
    run = TinyRun(tmp_path, store, stop_margin=0)
    job = Job(cluster, run, "--time=10", "--signal=USR2@90")

    # The end comes near. Slurm looks at its clock twice a minute: the ranks are held still until it has signalled.
    with held(job.two_ranks(after=0)) as ranks:
        cluster.run("scontrol", "update", f"jobid={job.number}", "TimeLimit=2")
        wait_until(lambda: not any(_unheard(rank, signal.SIGUSR2) for rank in ranks), "Slurm's signal", job.said)
    job.is_back_in_the_queue(restarts=1)
    assert "received SIGUSR2" in job.said()
    cluster.run("scontrol", "update", f"jobid={job.number}", "TimeLimit=10")

    # A job of more weight takes the nodes.
    job.two_ranks(after=run.update())
    urgent = ["--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"]
    cluster.submit(*urgent, cwd=tmp_path)
    job.is_back_in_the_queue(restarts=2)

    job.wait_for_state("COMPLETED", restarts=2)
    assert run.lines() == plain.lines()


def test_killed_tasks_end_the_job_and_faults_are_not_requeued_for_ever(
    cluster: SlurmCluster, store: Path, tmp_path: Path
) -> None:
    run = TinyRun(tmp_path, store, updates=100_000, save_every=5)
    job = Job(cluster, run, MAX_FAULTS="2")
    job.two_ranks(after=10)[1].kill()
    job.wait_for_state("PENDING", restarts=1)
    saved = run.checkpoints()[-1]
    cluster.start_now(job.number)
    job.wait_for_state("RUNNING", restarts=1)
    wait_until(lambda: run.checkpoints()[-1] > saved, "a newer checkpoint", job.said)
    job.two_ranks(after=run.update())[1].kill()
    job.wait_for_state("FAILED", restarts=1)
    assert "fault 2 in a row" in job.said()
    assert not list(tmp_path.glob("*.faults"))


def test_requeued_and_cancelled_by_hand(cluster: SlurmCluster, store: Path, tmp_path: Path) -> None:
    run = TinyRun(tmp_path, store, updates=100_000)
    job = Job(cluster, run)
    job.two_ranks(after=0)
    cluster.run("scontrol", "requeue", str(job.number))
    job.is_back_in_the_queue(restarts=1)
    job.two_ranks(after=run.update())
    cluster.run("scancel", str(job.number))
    wait_until(lambda: cluster.job(job.number)["JobState"] == "CANCELLED", "CANCELLED", job.said)
    wait_until(lambda: run.checkpoints()[-1] == run.update(), "a checkpoint of the last update", job.said)


def test_a_mistake_is_not_tried_again(cluster: SlurmCluster, store: Path, tmp_path: Path) -> None:
    run = TinyRun(tmp_path, store)
    run.arguments += ["--data.lanes", "7"]
    job = Job(cluster, run)
    job.wait_for_state("FAILED", restarts=0)
    assert job.said().count("data.lanes 7 cannot be shared by 2 ranks") == 1


def test_array_is_a_chain(cluster: SlurmCluster, store: Path, plain: TinyRun, tmp_path: Path) -> None:
    """Without requeue: the first job of the array stops on request, the second goes on to the end."""
    run = TinyRun(tmp_path, store)
    job = Job(cluster, run, "--array=1-2%1", "--no-requeue")
    job.two_ranks(after=0)
    cluster.run("scancel", "--signal=USR2", f"{job.number}_1")
    wait_until(run.checkpoints, "a checkpoint", job.said)
    assert run.checkpoints()[0] < run.updates, job.said()
    wait_until(lambda: run.updates in run.checkpoints(), "the end", job.said)
    wait_until(lambda: cluster.job(f"{job.number}_2")["JobState"] == "COMPLETED", "COMPLETED", job.said)
    assert run.lines() == plain.lines()


@contextmanager
def held(processes: list[psutil.Process]) -> Iterator[list[psutil.Process]]:
    """The processes stand still inside."""
    for process in processes:
        process.suspend()
    try:
        yield processes
    finally:
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.resume()


def _unheard(process: psutil.Process, number: signal.Signals) -> bool:
    """Whether a process that is held has not got the signal yet. (Slurm may wake it along with the signal.)"""
    try:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    except OSError:
        return False
    fields = dict(line.split(":", 1) for line in lines)
    waiting = (int(fields["ShdPnd"], 16) | int(fields["SigPnd"], 16)) >> (number - 1) & 1
    return fields["State"].split()[0] == "T" and not waiting
