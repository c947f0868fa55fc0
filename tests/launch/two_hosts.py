"""Two hosts on one machine: network, host-name and process namespaces joined by one cable, an sshd on each."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.harness.processes import PATIENCE

PROGRAMS = ("ip", "unshare", "sshd", "ssh", "ssh-keygen", "pdsh")
PACKAGES = "iproute2, util-linux, openssh-server, openssh-client, pdsh"
_PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


class TwoHosts:
    """A context manager. The hosts share this machine's files, as a cluster's hosts share a file system.

    `env` is what commands on a host need: an `ssh` that knows the keys and leaves the user's settings alone, and the
    name of the interface between the hosts.
    """

    addresses = ("198.18.0.1", "198.18.0.2")  # the block that RFC 2544 keeps for tests
    interface = "gptb0"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names = tuple(f"gptb-{os.getpid()}-{letter}" for letter in "ab")
        self._daemons: list[subprocess.Popen[bytes]] = []
        folder.mkdir(parents=True)
        commands = folder / "bin"
        commands.mkdir()
        (folder / "ssh_config").write_text(
            f"Host *\n IdentityFile {folder}/key\n IdentitiesOnly yes\n StrictHostKeyChecking no\n"
            " UserKnownHostsFile /dev/null\n LogLevel ERROR\n"
        )
        ssh = shutil.which("ssh")
        (commands / "ssh").write_text(f'#!/bin/sh\nexec {ssh} -F {folder}/ssh_config "$@"\n')
        (commands / "ssh").chmod(0o755)
        self.env = {
            "PATH": f"{commands}:{Path(sys.executable).parent}:{_PATH}",
            "GLOO_SOCKET_IFNAME": self.interface,
        }

    def __enter__(self) -> TwoHosts:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for daemon in self._daemons:
            # The daemon waits for its host's first process; the kernel ends all others with that one.
            first = Path(f"/proc/{daemon.pid}/task/{daemon.pid}/children").read_text().split()
            os.kill(int(first[0]) if first else daemon.pid, signal.SIGKILL)
            daemon.wait()
        for name in self.names:
            _run("ip", "netns", "delete", name, check=False)

    def on(self, host: int, *command: str) -> list[str]:
        """`command` as a command of host 0 or 1."""
        return [_which("ip"), "netns", "exec", self.names[host], *command]

    def cable(self, plugged: bool) -> None:
        """Pulls the cable out of the second host, or puts it back."""
        _run("ip", "-n", self.names[1], "link", "set", self.interface, "up" if plugged else "down")

    def _start(self) -> None:
        for name in self.names:
            _run("ip", "netns", "add", name)
        _run(
            *("ip", "link", "add", self.interface, "netns", self.names[0], "type", "veth"),
            *("peer", "name", self.interface, "netns", self.names[1]),
        )
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", f"{self.folder}/key")
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd insists on this empty folder
        for index, (name, address) in enumerate(zip(self.names, self.addresses, strict=True)):
            _run("ip", "-n", name, "link", "set", "lo", "up")
            _run("ip", "-n", name, "addr", "add", f"{address}/30", "dev", self.interface)
            _run("ip", "-n", name, "link", "set", self.interface, "up")
            self._start_sshd(index)
        end = time.monotonic() + PATIENCE
        while any(self._answer(0, address) != f"host-{n}" for n, address in enumerate(self.addresses)):
            if time.monotonic() > end:
                logs = "\n".join(p.read_text() for p in self.folder.glob("sshd-*.log"))
                raise RuntimeError(f"the hosts do not answer over ssh:\n{logs}")
            time.sleep(0.2)

    def _start_sshd(self, index: int) -> None:
        at = self.folder
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", f"{at}/host-{index}-key")
        (at / f"sshd-{index}.conf").write_text(
            f"ListenAddress {self.addresses[index]}\nHostKey {at}/host-{index}-key\nAuthorizedKeysFile {at}/key.pub\n"
            f"PidFile {at}/sshd-{index}.pid\nPermitRootLogin yes\nStrictModes no\nUsePAM no\n"
        )
        script = f"hostname host-{index} && exec {_which('sshd')} -D -e -f {at}/sshd-{index}.conf"
        isolated = [_which("unshare"), "--uts", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", script]
        with (at / f"sshd-{index}.log").open("wb") as log:
            self._daemons.append(
                subprocess.Popen(self.on(index, *isolated), stdout=log, stderr=log, start_new_session=True)
            )

    def _answer(self, host: int, address: str) -> str:
        command = self.on(host, "ssh", "-oConnectTimeout=2", address, "hostname")
        return subprocess.run(command, env=os.environ | self.env, capture_output=True, text=True).stdout.strip()


def missing_programs() -> list[str]:
    """What this machine lacks for two hosts: programs, or the right to make network namespaces."""
    missing = [name for name in PROGRAMS if not shutil.which(name, path=_PATH)]
    if not missing:
        name = f"gptb-{os.getpid()}-probe"
        if _run("ip", "netns", "add", name, check=False):
            missing.append("the right to add a network namespace (root with CAP_SYS_ADMIN)")
        else:
            _run("ip", "netns", "delete", name)
    return missing


def _which(program: str) -> str:
    path = shutil.which(program, path=_PATH)
    assert path, program
    return path


def _run(*command: str, check: bool = True) -> int:
    done = subprocess.run([_which(command[0]), *command[1:]], capture_output=True, text=True, timeout=PATIENCE)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
    return done.returncode
