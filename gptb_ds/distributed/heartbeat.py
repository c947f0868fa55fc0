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

import json
import os
import secrets
import socket
import sys
import threading
import time
from contextlib import suppress

from gptb_ds.distributed.links import Links, Loss
from gptb_ds.distributed.world import World
from gptb_ds.exit_codes import FAULT, HUNG

_TURN_SECONDS = 0.1
# So long may the main thread take to end by itself (gloo raises in it) once it is known who is lost.
_GRACE_SECONDS = 3.0
_CONNECT_SECONDS = 20.0


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
        os._exit(exit_code_of(loss))


def exit_code_of(loss: Loss) -> int:
    """The exit code of a rank that has lost another one."""
    return HUNG if loss.silent else FAULT


def lost_contact(world: World, loss: Loss) -> str:
    """The line that a rank ends with when another one is lost, or when the others have given it up."""
    me = f"[rank {world.rank} on {world.host}]"
    if loss.rank == world.rank:
        return f"{me} stopping, the other ranks gave this one up: {loss}"
    return f"{me} lost contact with another rank, stopping: {loss}"
