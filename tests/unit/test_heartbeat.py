"""Heartbeats of many ranks in one process, over real connections and under a clock that the test moves."""

from __future__ import annotations

import fcntl
import json
import socket
import struct
import termios
from collections.abc import Callable, Iterator

import pytest

from gptb_ds.distributed.links import Links, Loss
from tests.harness.processes import wait_until

LIMIT, SECRET, RANKS = 30.0, "secret", 300


class Job:
    """The connections of all ranks, taken in turn by this thread."""

    def __init__(self, ranks: int, limit: float = LIMIT) -> None:
        self.now, self._limit = 100.0, limit
        self.server = socket.create_server(("127.0.0.1", 0), backlog=4096)
        self.port = self.server.getsockname()[1]
        self.sockets: dict[int, socket.socket] = {}
        self.links = {0: Links(limit, SECRET, self.server)}
        for rank in range(1, ranks):
            self.connect(rank)
        self.until(lambda: self.links[0].ranks() == {*range(1, ranks)}, "all ranks to be known to rank 0")

    def connect(self, rank: int) -> None:
        link = socket.create_connection(("127.0.0.1", self.port))
        link.sendall(json.dumps([SECRET, rank, f"host-{rank // 8}"]).encode() + b"\n")
        self.sockets[rank], self.links[rank] = link, Links(self._limit, SECRET, None)
        self.links[rank].add(link, 0, "host-0")

    def turn(self, seconds: float = 0.1, without: tuple[int, ...] = ()) -> dict[int, Loss]:
        """Moves the clock and lets every rank have its turn; what each has learnt of."""
        self.now += seconds
        found = {rank: links.turn(self.now) for rank, links in self.links.items() if rank not in without}
        if seconds > 1:  # no packet may take seconds by this clock
            wait_until(self._delivered, "what was sent to arrive", every=0.0)
        return {rank: loss for rank, loss in found.items() if loss is not None}

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Turns in which nobody must be missed."""
        wait_until(lambda: (self.turn() == {}) and condition(), what, every=0.001)

    def losses(self, without: tuple[int, ...] = (), seconds: float = 0.1) -> dict[int, Loss]:
        """What every rank but those of `without` has learnt, once each has."""
        known: dict[int, Loss] = {}

        def all_know() -> bool:
            for rank, loss in self.turn(seconds, without).items():
                known.setdefault(rank, loss)
            return len(known) == len(self.links) - len(without)

        wait_until(all_know, "every rank to know", every=0.001)
        return known

    def pass_time(self, seconds: float, without: tuple[int, ...] = ()) -> None:
        """Time in which those that run beat, and in which nobody must be missed."""
        for _ in range(int(seconds / 2)):
            assert self.turn(2.0, without) == {}

    def _delivered(self) -> bool:
        """Whether everything that was sent is acknowledged, and so lies there to be read."""
        links = [link for link in [*self.sockets.values(), *self.links[0]._peers] if link.fileno() >= 0]
        return not any(struct.unpack("i", fcntl.ioctl(link, termios.TIOCOUTQ, b"\0" * 4))[0] for link in links)

    def close(self) -> None:
        for links in self.links.values():
            links.leave()


@pytest.fixture
def make() -> Iterator[Callable[..., Job]]:
    jobs: list[Job] = []

    def made(ranks: int, limit: float = LIMIT) -> Job:
        jobs.append(Job(ranks, limit))
        return jobs[-1]

    yield made
    for job in jobs:
        job.close()


def test_one_of_three_hundred_that_ends_is_named_to_all(make):
    job = make(RANKS)
    job.sockets[17].close()  # what the kernel does when a process ends, however it ends
    known = job.losses(without=(17,))
    assert {str(loss) for loss in known.values()} == {"rank 17 on host-2 has ended"}
    assert not any(loss.silent for loss in known.values())


def test_one_that_is_silent_is_named_to_all_after_the_limit(make):
    """Its process is there (stopped), its kernel acknowledges what comes."""
    job = make(12)
    job.pass_time(LIMIT - 6, without=(5,))
    known = job.losses(without=(5,), seconds=2.0)
    assert {loss.rank for loss in known.values()} == {5}
    assert all(loss.silent and "has not been heard of for 30 s" in str(loss) for loss in known.values())


def test_rank_0_is_missed_by_all_others(make):
    silent, ended = make(12), make(12)
    assert {loss.rank for loss in silent.losses(without=(0,), seconds=2.0).values()} == {0}
    ended.links[0].leave = lambda: None  # killed, it takes no leave
    for link in [*ended.links[0]._peers]:
        link.close()
    assert {str(loss) for loss in ended.losses(without=(0,)).values()} == {"rank 0 on host-0 has ended"}


def test_nobody_is_missed_after_a_pause_of_all(make):
    """Ranks are continued one after the other: rank 0 first and the last almost a limit later, or the other way."""
    for late in ((3,), (0,)):
        job = make(6)
        job.pass_time(LIMIT)
        job.now += 100_000
        job.pass_time(LIMIT - 6, without=late)
        job.pass_time(2 * LIMIT)


def test_one_that_takes_leave_is_not_missed(make):
    job = make(6)
    job.links.pop(4).leave()
    job.until(lambda: job.links[0].ranks() == {1, 2, 3, 5}, "rank 0 to let it go")
    job.pass_time(2 * LIMIT)


@pytest.mark.parametrize("said", [b"GET / HTTP/1.1\r\n\r\n", b'["guess", 1, "host"]\n', b"x" * 9000, b"7\n", b""])
def test_strangers_change_nothing(make, said):
    job = make(4)
    with socket.create_connection(("127.0.0.1", job.port)) as stranger:
        stranger.sendall(said)
        job.pass_time(2 * LIMIT)
        assert job.links[0].ranks() == {1, 2, 3}
    job.pass_time(2 * LIMIT)
