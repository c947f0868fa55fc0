"""The choice of the checkpoint that a run continues from."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from gptb_ds.checkpoint.format import (
    checkpoint_folders,
    has_lost_its_manifest,
    has_manifest,
    newest_good,
    verify_together,
)
from gptb_ds.config import ConfigError
from gptb_ds.distributed.slurm import slurm_continues
from gptb_ds.distributed.world import World


def resume_now(resume: str) -> str:
    """`run.resume` as it counts for this start: a job that Slurm has started before goes on, however it began."""
    return "auto" if slurm_continues(os.environ) else resume


def choose_checkpoint(
    resume: str, run: Path, world: World, say: Callable[[str], None]
) -> tuple[Path | None, list[Path]]:
    """The checkpoint that `run.resume` means, and what of the run in `run` the choice leaves behind.

    The latter is to be set aside, not deleted, once the checkpoint has turned out to fit. `say` is told what a
    person should know. Raises ValueError when `resume` names no good checkpoint.
    """
    folders = world.on_rank0(checkpoint_folders, run)
    everything = [run / "checkpoints", run / "metrics.jsonl", run / "config.yaml"]
    if resume != resume_now(resume):
        say(f"this job has run before: --run.resume {resume} was for its first start, now it is auto")
        resume = resume_now(resume)
    if resume == "never":
        return None, everything
    if resume == "auto":
        found, passed_over = newest_good(run, world)
        for line in passed_over.values():
            say(f"passed over {line}")
        # A save that was interrupted leaves nothing of worth; what once was a checkpoint is kept, out of the way.
        damaged = world.on_rank0(_worth_keeping, list(passed_over))
        return found, damaged if found or not damaged else everything
    found = Path(resume)
    world.on_rank0(_must_be_a_checkpoint, found)
    step = verify_together(found, world).step
    newer = [folder for folder in folders if int(folder.name.split("-")[1]) > step]
    return found, newer if world.on_rank0(is_own, found, run) else everything


def is_own(checkpoint: Path, run: Path) -> bool:
    """Whether a checkpoint is one of this run's, by whatever name it is called: folders are compared, not their names.

    `RUN/checkpoints` may be a link to another file system.
    """
    own = run / "checkpoints"
    names = (checkpoint, checkpoint.resolve())
    return own.is_dir() and any(name.parent.exists() and own.samefile(name.parent) for name in names)


def _worth_keeping(folders: list[Path]) -> list[Path]:
    return [folder for folder in folders if has_manifest(folder) or has_lost_its_manifest(folder)]


def _must_be_a_checkpoint(folder: Path) -> None:
    if folder.is_file():
        raise ConfigError(f"run.resume {folder}: is a file; name the checkpoint's folder, {folder.parent} perhaps")
    if not folder.is_dir():
        raise ConfigError(f"run.resume {folder}: no such folder; give auto, never or a checkpoint's folder")
    run = folder.parent if folder.name == "checkpoints" else folder
    if own := checkpoint_folders(run):
        what = "is a run" if run == folder else "holds the checkpoints of a run"
        raise ConfigError(
            f"run.resume {folder}: {what}, not one of its checkpoints; its newest is {own[0]}. With --run.dir"
            f" {run} auto takes the newest that is good"
        )
