"""The connections of a rank's heartbeats: who has sent what, who has fallen silent, whose connection has closed.

A protocol of lines: a beat, `lost` with who it was, `bye` of a rank that is through. No threads, no clock of its own.
"""

from __future__ import annotations

import errno
import json
import selectors
import socket
from contextlib import suppress
from dataclasses import dataclass, field

_LONGEST_BEAT = 3.0
_BEAT, _BYE, _LONGEST_LINE = b".\n", b"bye\n", 4096
# How the kernel says that nothing comes back from the other side.
_CUT_OFF = (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH)


@dataclass(frozen=True)
class Loss:
    """A rank that is lost: who, where and how it was noticed. `silent`: its process may still be there."""

    rank: int
    host: str
    how: str
    silent: bool

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} {self.how}"


@dataclass
class _Peer:
    """The other end of a connection; `rank` below 0: it has not said yet who it is."""

    rank: int
    host: str
    heard: float
    unread: bytes = field(default=b"")


class Links:
    """Connections to other ranks: rank 0 has one to each, every other rank one to rank 0. One thread uses it."""

    def __init__(self, limit: float, secret: str, server: socket.socket | None) -> None:
        """`server` is what rank 0 listens on; who connects shows the `secret` first."""
        self._limit, self._secret, self._server = limit, secret, server
        self._beat = min(limit / 10, _LONGEST_BEAT)
        self._selector = selectors.DefaultSelector()
        self._peers: dict[socket.socket, _Peer] = {}
        # Seconds that this process ran, when they were counted last, and when the next beat is due.
        self._clock, self._before, self._next_beat = 0.0, -1.0, 0.0
        if server is not None:
            server.setblocking(False)
            self._selector.register(server, selectors.EVENT_READ)

    def add(self, link: socket.socket, rank: int, host: str) -> None:
        link.setblocking(False)
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux; shorter than our own limit, because it knows more
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(700 * self._limit))
        self._peers[link] = _Peer(rank, host, self._clock)
        self._selector.register(link, selectors.EVENT_READ)

    def ranks(self) -> set[int]:
        """Who is at the other ends."""
        return {peer.rank for peer in self._peers.values() if peer.rank >= 0}

    def turn(self, now: float) -> Loss | None:
        """Reads what has come and sends what is due, without waiting; who is lost, which the others are told.

        `now` in seconds of a clock that only goes forward.
        """
        loss: Loss | None = None
        for key, _ in self._selector.select(0):
            link = key.fileobj
            assert isinstance(link, socket.socket)
            if link is self._server:
                self._accept(link)
            else:
                loss = loss or self._read(link)
        self._count_time(now)
        if loss is None and self._clock >= self._next_beat:
            self._next_beat = self._clock + self._beat
            loss = self._silent()
            self._send(_BEAT)
        if loss is not None:
            self._send(b"lost " + json.dumps([loss.rank, loss.host, loss.how, loss.silent]).encode() + b"\n")
        return loss

    def leave(self) -> None:
        """Says goodbye on all connections and closes them."""
        self._send(_BYE)
        for link in [*self._peers]:
            self._close(link)
        if self._server is not None:
            self._server.close()
        self._selector.close()

    def _count_time(self, now: float) -> None:
        passed = now - self._before if self._before >= 0 else 0.0
        self._before = now
        self._clock += min(passed, self._beat)
        if passed > self._limit / 4:  # paused, or starved: what the others have sent meanwhile is still to be read
            for peer in self._peers.values():
                peer.heard = self._clock

    def _silent(self) -> Loss | None:
        for peer in self._peers.values():
            if peer.rank >= 0 and self._clock - peer.heard > self._limit:
                how = f"has not been heard of for {self._limit:.0f} s (stopped, stuck in one call, or cut off)"
                return Loss(peer.rank, peer.host, how, True)
        return None

    def _accept(self, server: socket.socket) -> None:
        with suppress(OSError):  # none is waiting any more
            while True:
                link, (address, *_) = server.accept()
                self.add(link, -1, str(address))

    def _read(self, link: socket.socket) -> Loss | None:
        peer = self._peers[link]
        try:
            content = link.recv(1 << 16)
        except BlockingIOError:
            return None
        except OSError as error:
            self._close(link)
            cut_off = error.errno in _CUT_OFF
            return _lost(peer, "does not answer: its host is gone or cut off" if cut_off else "has ended")
        if not content:
            self._close(link)
            return _lost(peer, "has ended")
        peer.heard = self._clock
        *lines, peer.unread = (peer.unread + content).split(b"\n")
        for line in lines:
            if line == b"bye":
                self._close(link)
                return None
            if peer.rank < 0 and not self._introduces(peer, line):
                self._close(link)
                return None
            if line.startswith(b"lost "):
                return Loss(*json.loads(line[5:]))
        if len(peer.unread) > _LONGEST_LINE:  # none of ours
            self._close(link)
        return None

    def _introduces(self, peer: _Peer, line: bytes) -> bool:
        """Whether `line` makes a stranger a rank of this job."""
        with suppress(ValueError, TypeError):
            secret, rank, host = json.loads(line)
            if secret == self._secret:
                peer.rank, peer.host = int(rank), str(host)
                return True
        return False

    def _send(self, content: bytes) -> None:
        for link in self._peers:
            with suppress(OSError):  # full, because nobody reads there, or broken: reading will show it
                link.send(content)

    def _close(self, link: socket.socket) -> None:
        self._selector.unregister(link)
        del self._peers[link]
        link.close()


def _lost(peer: _Peer, how: str) -> Loss | None:
    return Loss(peer.rank, peer.host, how, False) if peer.rank >= 0 else None
