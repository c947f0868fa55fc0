"""Ranks that can't find each other say so at once, in one line that names what to change."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from gptb_ds.distributed.join import find_rank

PLACE = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}


def train_as(place: dict[str, str], tmp_path: Path, timeout: float) -> subprocess.CompletedProcess[str]:
    """One rank of a job whose other rank never comes."""
    command = [sys.executable, "-m", "gptb_ds", "train", "--data.path", "nowhere", "--run.dir", str(tmp_path / "run")]
    # With hang_seconds 300 the rendezvous itself would wait for ten minutes.
    command += ["--data.lanes", "2", "--train.updates", "200", "--run.hang_seconds", "300"]
    env = {name: value for name, value in os.environ.items() if name not in PLACE} | place
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout)


@pytest.mark.slow
def test_an_unknown_address_is_said_at_once(tmp_path: Path):
    done = train_as(PLACE | {"MASTER_ADDR": "no-such-host.invalid", "RANK": "1"}, tmp_path, timeout=120)
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("[rank 1 on ") and "MASTER_ADDR=no-such-host.invalid" in line
    assert "give the host or address of rank 0" in line
    assert done.returncode == (2 if unknown("no-such-host.invalid") else 1)
    assert not (tmp_path / "run").exists()


def unknown(name: str) -> bool:
    """Whether this machine's name server is sure that there is no such host, and not just out of reach."""
    try:
        socket.getaddrinfo(name, 1)
    except OSError as error:
        return error.errno == socket.EAI_NONAME
    return False


@pytest.mark.slow
def test_a_taken_port_is_said_at_once(tmp_path: Path):
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        port = str(other.getsockname()[1])
        done = train_as(PLACE | {"MASTER_PORT": port}, tmp_path, timeout=120)

    (line,) = [line for line in done.stderr.splitlines() if line.startswith(("[rank", "gptb-ds"))]
    assert line.startswith("[rank 0 on ") and f"MASTER_PORT={port}: another program listens there" in line
    assert "Traceback" not in done.stderr and done.returncode == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"MASTER_PORT": "29500x"}, "MASTER_PORT=29500x in the environment: must be a whole number from 1 to 65535"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT=70000"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two"),
        ({"RANK": "2"}, "RANK=2 in the environment: must be a whole number from 0 to 1"),
        ({"RANK": "-1"}, "RANK=-1"),
        ({"LOCAL_RANK": "first"}, "LOCAL_RANK=first"),
    ],
)
def test_numbers_in_the_environment_are_checked(changes: dict[str, str], words: str):
    assert find_rank(PLACE) == PLACE
    with pytest.raises(ValueError, match=words):
        find_rank(PLACE | changes)
