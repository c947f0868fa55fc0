"""What a resumed run must share with the run that saved, and what may have changed."""

from __future__ import annotations

from pathlib import Path

from gptb_ds.checkpoint.format import CheckpointError, Manifest


def check_identity(manifest: Manifest, identity: dict[str, object], folder: Path) -> None:
    """Raises CheckpointError with one line for each thing that must be the same and is not, both values named."""
    lines = [
        f"{folder}: {key} was {manifest.identity.get(key)!r} when this was saved and is {value!r} now"
        for key, value in identity.items()
        if manifest.identity.get(key) != value
    ]
    if lines:
        lines.append("set them back, name another --run.dir, or start anew with --run.resume never")
        raise CheckpointError("\n".join(lines))


def changed_settings(manifest: Manifest, settings: dict[str, object]) -> list[str]:
    """What may change and did, one phrase each."""
    keys = sorted(manifest.settings.keys() | settings.keys())
    return [
        f"{key} {manifest.settings.get(key)!r} -> {settings.get(key)!r}"
        for key in keys
        if manifest.settings.get(key) != settings.get(key)
    ]


def keeps_moments(manifest: Manifest, optimizer: str, resume_optimizer: str, folder: Path) -> bool:
    """Whether the run goes on with the checkpoint's moments: they are those of its optimizer.

    Raises CheckpointError, one line, when they are another's and `resume_optimizer` is not "switch".
    """
    before = manifest.settings.get("optim.name", "adamw")
    if before != optimizer and resume_optimizer != "switch":
        raise CheckpointError(
            f"{folder}: optim.name was {before!r} when this was saved and is {optimizer!r} now; set it back, or start"
            " its moments anew with --run.resume_optimizer switch"
        )
    return bool(before == optimizer)
