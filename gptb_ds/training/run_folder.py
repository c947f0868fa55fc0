"""A run's folder: one writer at a time, and nothing already saved is ever lost."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from gptb_ds.checkpoint.format import checkpoint_folders
from gptb_ds.config import ConfigError
from gptb_ds.distributed.world import World


class RunFolder:
    """The folder of a run, held by rank 0 until its process ends, however it ends.

    The lock is the operating system's (flock), so a dead run's lock is no obstacle.
    """

    def __init__(self, path: str, world: World) -> None:
        """Makes the folder, takes its lock, and looks whether it can be written, with its checkpoints.

        Raises ConfigError, on all ranks, when another run has it, or when a save in it would fail.
        """
        self.path, self._world = Path(path), world
        # Without flock it must not pretend: a lock of another kind outlives a killed run.
        self._lock = FileLock(self.path / "lock", fallback_to_soft=False)
        self.checkpoints = self.path / "checkpoints"
        world.on_rank0(self._take)
        try:
            world.on_rank0(self._probe)
        except BaseException:
            self._lock.release()
            raise

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

    def _probe(self) -> None:
        """Now, and not at the first save, hours later. A link to another file system counts as what it leads to."""
        link = f" (a link to {self.checkpoints.readlink()})" if self.checkpoints.is_symlink() else ""
        if link and not self.checkpoints.exists():
            raise ConfigError(f"{self.checkpoints}{link}: leads nowhere; mount what is there, or remove the link")
        if self.checkpoints.exists() and not self.checkpoints.is_dir():
            raise ConfigError(f"{self.checkpoints}{link}: is no folder; move it away, or name another --run.dir")
        for path, wanted in self._in_the_way():
            nowhere = path.is_symlink() and not path.exists()
            remedy = "mount what is there, or remove the link" if nowhere else "move it away, or name another --run.dir"
            what = f"a link that leads nowhere ({path.readlink()})" if nowhere else f"is no {wanted}"
            raise ConfigError(f"{path}: {what}; {remedy}")
        for folder in (self.path, self.checkpoints):
            try:
                if folder.is_dir():
                    tempfile.TemporaryFile(dir=folder).close()
            except OSError as error:
                raise ConfigError(f"{folder}{link}: cannot be written: {error.strerror}") from None

    def _in_the_way(self) -> Iterator[tuple[Path, str]]:
        """What has the name of something of a run and can't be it, and what it should be."""
        for name in ("metrics.jsonl", "config.yaml", "stop"):
            if (self.path / name).is_dir():
                yield self.path / name, "file"
        tokenizer = self.path / "tokenizer"
        folders = [*([tokenizer] if os.path.lexists(tokenizer) else []), *checkpoint_folders(self.path)]
        for folder in folders:
            if not folder.is_dir():
                yield folder, "folder"

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
        while (target := self.path / f"previous-{number:03d}").exists() or (self.checkpoints / target.name).exists():
            number += 1
        target.mkdir()
        if self.checkpoints.is_symlink() and any(path.is_relative_to(self.checkpoints) for path in present):
            # The link stays, and so does the file system that was chosen for checkpoints: it has room for them.
            beside = self.checkpoints.resolve() / target.name
            beside.mkdir()
            (target / "checkpoints").symlink_to(beside)
        for path in self._followed(present):
            place = target / path.relative_to(self.path)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(path, place)
        for name in ("metrics.jsonl", "config.yaml"):
            if (self.path / name).is_file() and not (target / name).exists():
                shutil.copy2(self.path / name, target / name)
        if (self.path / "tokenizer").is_dir():
            shutil.copytree(self.path / "tokenizer", target / "tokenizer")
        return target

    def _followed(self, paths: list[Path]) -> Iterator[Path]:
        """The paths, with what is in the checkpoints in place of a link to them."""
        for path in paths:
            if path == self.checkpoints and path.is_symlink():
                yield from sorted(child for child in path.iterdir() if not child.name.startswith("previous-"))
            else:
                yield path

    def release(self) -> None:
        self._lock.release()
