"""Heartbeats between the ranks of a job: a rank or host that is lost is known in seconds, to all ranks and by name.

Backends don't tell. NCCL does not notice that a peer is dead: its kernels go on waiting for it. gloo raises on a closed
connection, but names an address, and a host that is cut off closes nothing.

Each rank holds one connection to rank 0 and sends a byte now and then; so does rank 0 to each. A process that ends,
however it ends, has its connection closed by its kernel; a host that is gone acknowledges nothing (TCP_USER_TIMEOUT); a
process that is stopped sends nothing. Rank 0 tells the others who it was. For a thousand ranks that is a few hundred
small messages a second, which one thread of rank 0 takes ten times a second.

A thread sends them: a rank may compute, compile or read for as long as it takes. It is silent only in a call that holds
Python's lock all the while.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field

from gptb_ds.distributed.world import World
from gptb_ds.exit_codes import FAULT, HUNG

_TURN_SECONDS = 0.1
_LONGEST_BEAT = 3.0
# So long may the main thread take to end by itself (gloo raises in it) once it is known who is lost.
_GRACE_SECONDS = 3.0
_CONNECT_SECONDS = 20.0
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


class _Process:
    """This process's heartbeats, if it has any, and the first loss that it has learnt of."""

    heartbeat: Heartbeat | None = None
    loss: Loss | None = None
    learnt = threading.Event()
    said = False


def claim_loss(patience: float = 0.0) -> Loss | None:
    """The rank that is lost, for whoever says so now; nobody else says it then. Waits up to `patience` seconds for it.

    What a backend raises when another rank has ended comes before or after we know who it was.
    """
    if _Process.heartbeat is not None:
        _Process.learnt.wait(patience)
    if _Process.loss is not None:
        _Process.said = True
    return _Process.loss


def take_leave() -> None:
    """Tells the other ranks that this one goes, and that it is no loss. All ranks go, or they would wait for it."""
    if _Process.heartbeat is not None:
        _Process.heartbeat.stop()


class Heartbeat:
    """This rank's heartbeats. When another rank is lost it says so in one line and ends this process.

    Only time in which this process ran counts: in a pause of the whole job (SIGSTOP, `scontrol suspend`, a laptop's
    lid) nobody is missed, and who is continued a little later than this rank has all its time again.
    """

    def __init__(self, world: World, limit: float) -> None:
        """`limit`: seconds without a sign of life after which a rank is lost. Every rank must build one together."""
        self._world, self._hushed = world, False
        self._ended = threading.Event()
        server = self._listen() if world.rank == 0 else None
        own = (server.getsockname()[1] if server else 0, secrets.token_hex(8), world.host)
        port, secret, host = world.broadcast(own)
        self._links = Links(limit, secret, server)
        if world.rank > 0 and port > 0:
            self._connect(port, secret, host)
        _Process.heartbeat = self
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Takes leave of the others: that this rank goes is no loss. Its thread has ended afterwards."""
        self._ended.set()
        self._thread.join()
        self._links.leave()
        _Process.heartbeat = None

    def hush(self) -> None:
        """From here on somebody else ends this process."""
        self._hushed = True

    def _listen(self) -> socket.socket | None:
        """A socket on a free port of all addresses of this host."""
        with suppress(OSError):  # no IPv6 here
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
        try:
            return socket.create_server(("", 0), backlog=4096)
        except OSError as error:
            self._goes_without(f"this host gives no port ({error.strerror or error})")
            return None

    def _connect(self, port: int, secret: str, host: str) -> None:
        address = os.environ["MASTER_ADDR"]
        try:
            link = socket.create_connection((address, port), timeout=_CONNECT_SECONDS)
            link.sendall(json.dumps([secret, self._world.rank, self._world.host]).encode() + b"\n")
        except OSError as error:
            self._goes_without(f"{address}:{port} of rank 0 cannot be reached ({error.strerror or error})")
        else:
            self._links.add(link, 0, host)

    def _goes_without(self, why: str) -> None:
        print(
            f"[rank {self._world.rank} on {self._world.host}] WARNING: no heartbeats, {why}: a lost rank may be"
            " noticed after run.hang_seconds only",
            file=sys.stderr,
            flush=True,
        )

    def _watch(self) -> None:
        while not self._ended.wait(_TURN_SECONDS):
            loss = self._links.turn(time.monotonic())
            if loss is not None:
                _Process.loss = loss
                _Process.learnt.set()
                # A stop in between means that this rank was through: then nobody is missed any more.
                if not self._ended.wait(_GRACE_SECONDS) and not self._hushed:
                    self._end(loss)
                return

    def _end(self, loss: Loss) -> None:
        if not _Process.said:
            print(lost_contact(self._world, loss), file=sys.stderr, flush=True)
        elif self._ended.wait(_GRACE_SECONDS):  # the main thread is saying it, and ends the process itself
            return
        os._exit(HUNG if loss.silent else FAULT)


def lost_contact(world: World, loss: Loss) -> str:
    """The line that a rank ends with when another one is lost, or when the others have given it up."""
    me = f"[rank {world.rank} on {world.host}]"
    if loss.rank == world.rank:
        return f"{me} stopping, the other ranks gave this one up: {loss}"
    return f"{me} lost contact with another rank, stopping: {loss}"


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
