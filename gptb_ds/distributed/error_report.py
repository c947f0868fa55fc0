"""Error reports of a rank: its own fault with the traceback, another rank's end as one line."""

from __future__ import annotations

import sys
import traceback

import torch.distributed as dist

from gptb_ds.distributed.heartbeat import claim_loss, exit_code_of, lost_contact
from gptb_ds.distributed.world import World
from gptb_ds.exit_codes import FAULT

# What torch's backends say when the other side of a connection is gone.
_ECHOES = (
    *("gloo", "nccl", "tcpstore", "connection closed by peer", "connection reset by peer", "connection refused"),
    *("connection was likely closed", "broken pipe", "timed out waiting", "socket timeout"),
)


# A backend may raise before the heartbeats have told whose connection that was.
_PATIENCE = 5.0


def report_error(error: BaseException, world: World) -> int:
    """Prints a fault on standard error: its traceback, or one line when another rank's end caused it.

    Returns the exit code. After the loss of a rank it is the one that the heartbeats would end this process with:
    whether they do, or the backend raises first because yet another rank has ended, is a race.
    """
    me = f"[rank {world.rank} on {world.host}]" if world.size > 1 else "gptb-ds train:"
    if world.size > 1 and _is_echo(error):
        loss = claim_loss(_PATIENCE)
        if loss is not None:
            print(lost_contact(world, loss), file=sys.stderr, flush=True)
            return exit_code_of(loss)
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        text = f"{me} lost contact with another rank, stopping ({first[:200]})"
    else:
        lines = "".join(traceback.format_exception(error)).rstrip().splitlines()
        text = "\n".join(f"{me} {line}" if world.size > 1 else line for line in lines)
    print(text, file=sys.stderr, flush=True)
    return FAULT


def _is_echo(error: BaseException) -> bool:
    if isinstance(error, dist.DistError):
        return True
    return type(error) is RuntimeError and any(word in str(error).lower() for word in _ECHOES)
