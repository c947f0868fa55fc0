"""A throw-away Slurm cluster: one controller and two nodes on this machine, everything under one folder."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

from tests.harness.processes import PATIENCE, free_ports

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "sinfo")
PACKAGES = "slurm-wlm, munge"


class SlurmCluster:
    """A context manager; inside it `env` makes Slurm's commands talk to this cluster.

    The nodes are called after loopback addresses, so that `scontrol show hostnames` gives names that resolve without
    touching /etc/hosts.
    """

    nodes = ("127.0.0.1", "127.0.0.2")

    def __init__(self, folder: Path, cpus_per_node: int = 2) -> None:
        self.folder = folder
        self.env = dict(os.environ, SLURM_CONF=str(folder / "slurm.conf"))
        self._daemons: list[subprocess.Popen[bytes]] = []
        for name in ("state", "spool-1", "spool-2"):
            (folder / name).mkdir(parents=True)
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        (folder / "slurm.conf").write_text(self._configuration(cpus_per_node))

    def __enter__(self) -> SlurmCluster:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        jobs = [line.split()[0] for line in self._try("squeue", "-h", "-o", "%A").splitlines() if line.strip()]
        if jobs:
            self._try("scancel", "--full", "--signal=KILL", *jobs)
            self._try("scancel", *jobs)
            _wait_until(lambda: not self._try("squeue", "-h").strip(), 60)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in reversed(self._daemons):
            try:
                daemon.wait(60)
            except subprocess.TimeoutExpired:
                daemon.send_signal(signal.SIGKILL)
                daemon.wait()
        self._daemons.clear()

    def run(self, *command: str) -> str:
        """A Slurm command's output. Raises RuntimeError with what it said when it fails."""
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=PATIENCE)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
        return done.stdout

    def submit(self, *arguments: str, cwd: Path, env: dict[str, str] | None = None) -> str:
        """`sbatch` with these arguments; the job's number."""
        done = subprocess.run(
            ["sbatch", "--parsable", *arguments], env=self.env | (env or {}), cwd=cwd, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"sbatch {' '.join(arguments)}: {done.stderr}")
        return done.stdout.strip().split(";")[0]

    def job(self, number: str) -> dict[str, str]:
        """The fields of `scontrol show job`: JobState, Restarts, ExitCode, ..."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "-o", "show", "job", number)))

    def start_now(self, number: str) -> None:
        """Starts a requeued job, which Slurm would let wait for two minutes.

        Not at once: in the second of its end a node refuses it, as its credential was revoked in that second.
        """
        time.sleep(3)
        self.run("scontrol", "update", f"jobid={number}", "StartTime=now")

    def log(self) -> str:
        """The last lines of the daemons, for a failed test's message."""
        return "\n".join(f"== {p.name}\n{p.read_text()[-1500:]}" for p in sorted(self.folder.glob("*.log")))

    def _start(self) -> None:
        at = self.folder
        self._spawn(
            "munged", "--foreground", "--force", f"--socket={at}/munge.socket", f"--key-file={at}/munge.key",
            f"--pid-file={at}/munged.pid", f"--log-file={at}/munged.log", f"--seed-file={at}/munged.seed",
        )  # fmt: skip
        if not _wait_until((at / "munge.socket").exists, PATIENCE):
            raise RuntimeError(f"munged did not start:\n{self.log()}")
        self._spawn("slurmctld", "-D", "-c")
        for node in self.nodes:
            self._spawn("slurmd", "-D", "-c", "-N", node)
        if not _wait_until(lambda: self._try("sinfo", "-h", "-o", "%t %D").split() == ["idle", "2"], PATIENCE):
            raise RuntimeError(f"the cluster did not come up:\n{self._try('sinfo')}\n{self.log()}")

    def _spawn(self, program: str, *arguments: str) -> None:
        path = shutil.which(program, path=_PATH)
        assert path, program
        self._daemons.append(
            subprocess.Popen(
                [path, *arguments],
                env=self.env,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        )

    def _try(self, *command: str) -> str:
        try:
            return subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=20).stdout
        except subprocess.TimeoutExpired:
            return ""

    def _configuration(self, cpus: int) -> str:
        at, host = self.folder, socket.gethostname().split(".")[0]
        ports = free_ports(3)
        lines = [
            "ClusterName=throwaway",
            f"SlurmctldHost={host}(127.0.0.1)",
            f"SlurmctldPort={ports[0]}",
            "SlurmUser=root",
            "SlurmdUser=root",
            "AuthType=auth/munge",
            "CredType=cred/munge",
            f"AuthInfo=socket={at}/munge.socket",
            f"StateSaveLocation={at}/state",
            f"SlurmctldPidFile={at}/slurmctld.pid",
            f"SlurmctldLogFile={at}/slurmctld.log",
            "SlurmctldTimeout=30",
            "ProctrackType=proctrack/linuxproc",
            "TaskPlugin=task/none",
            "MpiDefault=none",
            "SchedulerType=sched/builtin",
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_Core",
            "SlurmdParameters=config_overrides",
            "ReturnToService=2",
            "JobRequeue=1",
            "PreemptType=preempt/partition_prio",
            "PreemptMode=REQUEUE",
            "MailProg=/bin/true",
        ]
        for index, node in enumerate(self.nodes, start=1):
            lines.append(
                f"NodeName={node} NodeHostname={host} NodeAddr={node} Port={ports[index]} CPUs={cpus} State=UNKNOWN"
            )
        lines += [
            f"SlurmdSpoolDir={at}/spool-%n",
            f"SlurmdPidFile={at}/slurmd-%n.pid",
            f"SlurmdLogFile={at}/slurmd-%n.log",
            f"PartitionName=main Nodes={','.join(self.nodes)} Default=YES MaxTime=INFINITE PriorityTier=1 State=UP",
            f"PartitionName=urgent Nodes={','.join(self.nodes)} MaxTime=INFINITE PriorityTier=2 State=UP",
        ]
        return "\n".join(lines) + "\n"


_PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


def missing_programs() -> list[str]:
    """The programs of Slurm and munge that this machine lacks."""
    return [name for name in PROGRAMS if not shutil.which(name, path=_PATH)]


def _wait_until(condition, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not (true := condition()) and time.monotonic() < end:
        time.sleep(0.1)
    return bool(true)
