"""A run's folder: one writer at a time, and nothing already saved is ever lost."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from filelock import FileLock, Timeout

from gptb_ds.config import ConfigError
from gptb_ds.distributed.world import World


class RunFolder:
    """The folder of a run, held by rank 0 until its process ends, however it ends.

    The lock is the operating system's (flock), so a dead run's lock is no obstacle.
    """

    def __init__(self, path: str, world: World) -> None:
        """Makes the folder and takes its lock. Raises ConfigError, on all ranks, when another run has it."""
        self.path, self._world = Path(path), world
        # Without flock it must not pretend: a lock of another kind outlives a killed run.
        self._lock = FileLock(self.path / "lock", fallback_to_soft=False)
        world.on_rank0(self._take)

    def _take(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ConfigError(
                f"run.dir {self.path}: another training run is writing here; wait for it, or name another --run.dir"
            ) from None
        except NotImplementedError:
            raise ConfigError(
                f"run.dir {self.path}: its file system has no locks (flock); mount it with them (Lustre: -o flock),"
                " or name a --run.dir elsewhere"
            ) from None
        except OSError as error:
            raise ConfigError(f"run.dir {self.path}: cannot be written: {error}") from None

    def set_aside(self, paths: Iterable[Path]) -> Path | None:
        """Moves files of an earlier run into a new folder `previous-N` of this one; returns it (None: none existed).

        Copies of the run's metrics, configuration and tokenizer go with them, so that what was moved can be used.
        Every rank calls it; rank 0 moves.
        """
        return self._world.on_rank0(self._move, list(paths))

    def _move(self, paths: list[Path]) -> Path | None:
        present = [path for path in paths if path.exists()]
        if not present:
            return None
        number = 1
        while (target := self.path / f"previous-{number:03d}").exists():
            number += 1
        for path in present:
            place = target / path.relative_to(self.path)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(path, place)
        for name in ("metrics.jsonl", "config.yaml"):
            if (self.path / name).is_file() and not (target / name).exists():
                shutil.copy2(self.path / name, target / name)
        if (self.path / "tokenizer").is_dir():
            shutil.copytree(self.path / "tokenizer", target / "tokenizer")
        return target

    def release(self) -> None:
        self._lock.release()
