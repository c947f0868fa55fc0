"""Ranks that can't find each other say so at once, in one line that names what to change."""

from __future__ import annotations

import functools
import os
import socket
from pathlib import Path

import pytest

from gptb_ds.distributed.join import find_rank
from tests.harness.training import launch

PLACE = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}


def train_as(place: dict[str, str], tmp_path: Path) -> tuple[int, str]:
    """One rank of a job whose other rank never comes: its exit code, and what it prints."""
    # With hang_seconds 300 the rendezvous itself would wait for ten minutes.
    options = {"data.path": "nowhere", "run.dir": tmp_path / "run", "data.lanes": 2, "train.updates": 200}
    args = ["train", *(f"--{key}={value}" for key, value in options.items()), "--run.hang_seconds=300"]
    job = launch(args, 1, tmp_path / "said", fault=functools.partial(be_at, place))
    (code,) = job.wait(120)
    return code, job.text()


def be_at(place: dict[str, str], rank: int) -> None:
    os.environ |= place


@pytest.mark.slow
def test_an_unknown_address_is_said_at_once(tmp_path: Path):
    code, said = train_as(PLACE | {"MASTER_ADDR": "no-such-host.invalid", "RANK": "1"}, tmp_path)
    (line,) = said.strip().splitlines()
    assert line.startswith("[rank 1 on ") and "MASTER_ADDR=no-such-host.invalid" in line
    assert "give the host or address of rank 0" in line
    assert code == (2 if unknown("no-such-host.invalid") else 1)
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
        code, said = train_as(PLACE | {"MASTER_PORT": port}, tmp_path)

    (line,) = [line for line in said.splitlines() if line.startswith(("[rank", "gptb-ds"))]
    assert line.startswith("[rank 0 on ") and f"MASTER_PORT={port}: another program listens there" in line
    assert "Traceback" not in said and code == 1


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
