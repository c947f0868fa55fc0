"""The writing of checkpoints: a snapshot while training waits, the files behind its back, the manifest last."""

from __future__ import annotations

import hashlib
import shutil
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Concatenate, ParamSpec

import torch
from safetensors.torch import save_file

from gptb_ds.atomic_files import replace_file, sha256_of, sync_path, write_atomically
from gptb_ds.checkpoint.format import (
    MANIFEST,
    MANIFEST_COPY,
    CheckpointError,
    FileFacts,
    Manifest,
    checkpoint_folder,
    checkpoint_folders,
    read_manifest,
)
from gptb_ds.distributed.world import World

P = ParamSpec("P")

# So many ranks write files; the others hand their lanes to one of them. A thousand ranks are not a thousand files.
MAX_WRITERS = 32


def writer_blocks(world_size: int, max_writers: int = MAX_WRITERS) -> list[range]:
    """The ranks in blocks of neighbours; the first of each block writes for it."""
    size = -(-world_size // max_writers)
    return [range(start, min(start + size, world_size)) for start in range(0, world_size, size)]


def assign_parameters(shapes: dict[str, tuple[int, ...]], writers: list[int]) -> dict[str, int]:
    """Which writer saves each parameter: runs of about equal numbers of elements, in the given order."""
    sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    total, before, owner = max(1, sum(sizes.values())), 0, {}
    for name, size in sizes.items():
        owner[name] = writers[min(len(writers) - 1, (before + size // 2) * len(writers) // total)]
        before += size
    return owner


class SaveError(OSError):
    """What must reach the disk can't be written. Every rank raises it; the message says what, and why."""


class CheckpointWriter:
    """Writes one checkpoint at a time. Every rank calls each method at the same update's edge."""

    def __init__(self, run: Path, world: World, keep: int, model_files: Mapping[str, bytes] | None = None) -> None:
        """`model_files` (see `checkpoint.model_files`) go into every checkpoint; those of rank 0 count."""
        self._run, self._world, self._keep = run, world, keep
        self._model_files = dict(model_files or {}) if world.rank == 0 else {}
        self._blocks = writer_blocks(world.size)
        self._block = next(block for block in self._blocks if world.rank in block)
        self._thread: threading.Thread | None = None
        self._manifest: Manifest | None = None
        self._entries: dict[str, FileFacts] = {}
        self._error: OSError | None = None

    @property
    def writers(self) -> list[int]:
        return [block[0] for block in self._blocks]

    @property
    def step(self) -> int:
        """The update whose checkpoint is in flight."""
        assert self._manifest is not None
        return self._manifest.step

    def folder(self, step: int) -> Path:
        return checkpoint_folder(self._run, step)

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is begun and not completed."""
        return self._manifest is not None

    @property
    def written_here(self) -> bool:
        """Whether this rank's files are on the disk (or have failed)."""
        return self._thread is None or not self._thread.is_alive()

    def begin(
        self,
        manifest: Manifest,
        parameters: dict[str, dict[str, torch.Tensor]],
        lanes: dict[str, torch.Tensor],
        random_state: dict[str, torch.Tensor],
    ) -> None:
        """Takes the CPU tensors, which must not change afterwards, and writes them in the background.

        `parameters` is Engine.export of this rank's share; `lanes` and `random_state` are this rank's.
        Raises SaveError on all ranks when the folder can't be made.
        """
        assert not self.busy, "finish the checkpoint before"
        folder = checkpoint_folder(self._run, manifest.step)
        self._on_rank0(_clear, folder)
        leader, ranks = self._block[0], f"{self._block[0]:06d}-{self._block[-1] + 1:06d}"
        lanes = {k: v.flatten(0, 1) for k, v in self._world.gather_to(lanes, leader, self._block).items()}
        random_state = self._world.gather_to(random_state, leader, self._block)
        files: dict[str, dict[str, torch.Tensor]] = {}
        if self._world.rank == leader:
            per_rank = manifest.lanes // self._world.size
            span = f"{self._block[0] * per_rank:09d}-{(self._block[-1] + 1) * per_rank:09d}"
            number = f"{self._blocks.index(self._block):05d}-of-{len(self._blocks):05d}"
            files[f"lanes-{span}"] = lanes
            files[f"rng-{ranks}"] = random_state
            if parameters["weight"]:
                files[f"model-{number}"] = parameters["weight"]
                moments = [kind for kind in parameters if kind != "weight"]
                files[f"optimizer-{number}"] = {
                    f"{kind}/{name}": tensor for kind in moments for name, tensor in parameters[kind].items()
                }
        self._manifest, self._entries, self._error = manifest, {}, None
        self._thread = threading.Thread(target=self._write, args=(folder, files), name="checkpoint", daemon=True)
        self._thread.start()

    def finish(self) -> Path:
        """Waits for the files, then writes the manifest and deletes old checkpoints. Returns the folder.

        Raises SaveError on all ranks when a file could not be written; what was there before is untouched.
        """
        assert self._manifest is not None and self._thread is not None
        self._thread.join()
        manifest, self._manifest, self._thread = self._manifest, None, None
        folder = checkpoint_folder(self._run, manifest.step)
        results = self._world.all_gather((str(self._error) if self._error else None, self._entries))
        problems = [f"rank {rank}: {problem}" for rank, (problem, _) in enumerate(results) if problem]
        if problems:
            self._world.on_rank0(lambda: shutil.rmtree(folder, ignore_errors=True))
            raise SaveError(f"checkpoint {folder} could not be written: {'; '.join(problems)}")
        files = {name: entry for _, entries in results for name, entry in entries.items()}
        self._on_rank0(self._complete, folder, replace(manifest, files=files))
        return folder

    def _on_rank0(
        self, function: Callable[Concatenate[Path, P], None], folder: Path, *args: P.args, **kwargs: P.kwargs
    ) -> None:
        try:
            self._world.on_rank0(function, folder, *args, **kwargs)
        except OSError as error:
            raise SaveError(f"checkpoint {folder} could not be written: {error}") from None

    def _write(self, folder: Path, files: dict[str, dict[str, torch.Tensor]]) -> None:
        try:
            for file, content in self._model_files.items():
                (folder / file).parent.mkdir(exist_ok=True)
                replace_file(folder / file, content)
                self._entries[file] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, tensors in files.items():
                path = folder / f"{name}.safetensors"
                with write_atomically(path) as temporary:
                    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, temporary)
                    digest = sha256_of(temporary)
                self._entries[path.name] = {"bytes": path.stat().st_size, "sha256": digest}
        except Exception as error:  # any failure must reach the training loop, which is not this thread
            self._error = error if isinstance(error, OSError) else OSError(f"{type(error).__name__}: {error}")

    def _complete(self, folder: Path, manifest: Manifest) -> None:
        for name in (MANIFEST_COPY, MANIFEST):
            replace_file(folder / name, manifest.to_json())
        sync_path(folder.parent)
        with suppress(OSError):  # the checkpoint is there; what can't be deleted now goes after the next one
            prune(self._run, self._keep)


def prune(run: Path, keep: int) -> None:
    """Deletes all but the `keep` newest complete checkpoints, and what interrupted saves older than those left."""
    good = 0
    for folder in checkpoint_folders(run):
        if good >= keep:
            _remove(folder)
            continue
        try:
            read_manifest(folder)
            good += 1
        except CheckpointError:
            continue


def _remove(folder: Path) -> None:
    # Without its manifests it is no checkpoint any more, whatever is interrupted next.
    for name in (MANIFEST, MANIFEST_COPY):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _clear(folder: Path) -> None:
    """An empty folder: what an interrupted save of this step left is removed."""
    if folder.exists():
        _remove(folder)
    folder.mkdir(parents=True)
    sync_path(folder.parent)
