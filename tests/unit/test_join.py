"""A process finds its rank, whatever launched it."""

from __future__ import annotations

import socket

import pytest

from gptb_ds.distributed import join
from gptb_ds.distributed.join import JoinError, find_rank, visible_index

TORCH = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"}
STEP = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0"}


def test_how_ranks_are_found():
    assert find_rank({}) is None
    assert find_rank(TORCH) == TORCH
    assert find_rank(STEP | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"}) == TORCH
    # A Slurm batch script, and one task alone, are single processes.
    assert find_rank({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}) is None
    assert find_rank(STEP | {"SLURM_STEP_NUM_TASKS": "1"}) is None
    with pytest.raises(ValueError, match="MASTER_ADDR and MASTER_PORT"):
        find_rank(STEP)
    with pytest.raises(ValueError, match="sets RANK but not WORLD_SIZE"):
        find_rank({"RANK": "0"})
    # mpirun inside a Slurm allocation: its daemons' place in Slurm is not ours.
    with pytest.raises(ValueError, match="mpirun started 8 ranks, but the environment sets WORLD_SIZE=4"):
        find_rank(TORCH | {"OMPI_COMM_WORLD_SIZE": "8"})


def test_mpi_is_asked_before_slurm(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(join, "_ask_mpi", lambda env: {"RANK": "asked"})
    inside_slurm = STEP | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"}
    assert find_rank(inside_slurm | {"OMPI_COMM_WORLD_SIZE": "24"}) == {"RANK": "asked"}
    assert find_rank({"PMI_SIZE": "2"}) == {"RANK": "asked"}
    assert find_rank(inside_slurm | {"PMI_SIZE": "4"}) == TORCH


def test_the_address_for_other_hosts_is_not_the_loopback_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "10.1.2.3")
    assert join._own_address() == "10.1.2.3"
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.1.1")  # Debian's /etc/hosts
    monkeypatch.setattr(socket, "socket", lambda *_: Probe())
    assert join._own_address() == "10.4.5.6"


class Probe:
    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def connect(self, address: tuple[str, int]) -> None:
        pass

    def getsockname(self) -> tuple[str, int]:
        return "10.4.5.6", 1


def test_a_rank_takes_the_gpu_it_sees():
    assert [visible_index(rank, 4) for rank in range(4)] == [0, 1, 2, 3]
    # Slurm's --gpus-per-task=1: local rank 3 sees one GPU, and that is number 0.
    assert visible_index(3, 1) == 0
    with pytest.raises(JoinError, match="local rank 2 has no GPU: 2 are visible here; start at most 2 ranks"):
        visible_index(2, 2)
