"""C++ extensions that torch builds when they are first needed: where, by whom, and the locks that killed builds leave.

DeepSpeed's CPU Adam is one. `torch.utils.cpp_extension.load` (torch 2.13, `_jit_compile`) makes an empty file `lock` in
the extension's folder while it builds; whoever finds one waits until it is gone. A process that is killed leaves it
there, and every later run would wait for ever, without a word.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

CPU_ADAM = "cpu_adam"  # what DeepSpeed calls its optimizer for offload
# Between two changes in its folder a build takes less: one compiler's run. On files that several hosts share there is
# no other sign of who is at work elsewhere.
_LONGEST_SILENCE = 600.0
_LOOK_SECONDS = 0.5
# File systems that no other host can write to.
_LOCAL = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "overlay", "tmpfs", "apfs"}


def build_folder(name: str) -> Path:
    """Where torch builds and finds the extension `name` (under TORCH_EXTENSIONS_DIR); made if it isn't there.

    Raises OSError when it can't be made.
    """
    from torch.utils.cpp_extension import _get_build_directory

    return Path(_get_build_directory(name, False))


def built(name: str, build: Callable[[], T], say: Callable[[str], None]) -> T:
    """`build()`, which builds the extension `name` or finds it built. One process after the other does so on a host.

    Says when that takes long, and why. Raises ValueError, one line, when it can't be built.
    """
    try:
        folder = build_folder(name)
        with _turn(folder):
            wait_for_lock(folder, say)
            if not any(folder.glob("*.so")):
                say(f"building DeepSpeed's {name} in {folder}, once: one to two minutes")
            return build()
    except (RuntimeError, ImportError, OSError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        reason = next((line for line in lines if "error:" in line.lower()), lines[0])
        raise ValueError(
            f"DeepSpeed's {name}, which steps an optimizer that is offloaded, can't be built here: {reason[:300]};"
            " see `gptb-ds doctor`, or choose a policy without offload_optimizer"
        ) from None


def abandoned(lock: Path) -> bool:
    """Whether the process that made `lock` is gone.

    A builder keeps it open. On files that other hosts share, the builder may be elsewhere: then it is gone when nothing
    in the folder has changed for longer than a compiler runs.
    """
    if not lock.exists() or _is_open(lock):
        return False
    return _is_local(lock.parent) or _quiet_seconds(lock.parent) > _LONGEST_SILENCE


def wait_for_lock(folder: Path, say: Callable[[str], None]) -> None:
    """Returns when no build is under way: what a killed one has left is removed."""
    lock, said = folder / "lock", False
    while lock.exists():
        if abandoned(lock):
            say(f"removing {lock}, which a build that was killed has left behind")
            lock.unlink(missing_ok=True)
        elif not said:
            said = True
            say(f"waiting for another program's build in {folder} (if there is none: remove {lock})")
        else:
            time.sleep(_LOOK_SECONDS)


@contextmanager
def _turn(folder: Path) -> Iterator[None]:
    """Inside, no other process of ours is in here. The kernel ends the turn of one that is killed."""
    with (folder / "gptb-ds.turn").open("w") as file:
        with suppress(OSError):  # a file system without such locks: torch's own has to do
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _is_open(file: Path) -> bool:
    """Whether a process that we may look at has `file` open."""
    wanted = str(file.resolve())
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or belongs to somebody else
            for descriptor in (process / "fd").iterdir():
                with suppress(OSError):
                    if os.readlink(descriptor) == wanted:
                        return True
    return False


def _is_local(folder: Path) -> bool:
    """Whether only this host can write to `folder`'s file system, as far as its kind tells."""
    kinds: dict[Path, str] = {}
    with suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            place, _, source = line.partition(" - ")
            kinds[Path(place.split()[4])] = source.split()[0]
    at = folder.resolve()
    return next((kinds[place] for place in (at, *at.parents) if place in kinds), "") in _LOCAL


def _quiet_seconds(folder: Path) -> float:
    """How long nothing has changed in `folder`, by the clock of its file system."""
    times = []
    for file in folder.iterdir():
        with suppress(OSError):
            if file.suffix != ".turn":
                times.append(file.stat().st_mtime)
    with tempfile.NamedTemporaryFile(dir=folder) as new:
        return os.stat(new.name).st_mtime - max(times, default=0.0)
