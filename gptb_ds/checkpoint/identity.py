"""What a resumed run must share with the run that saved, and what may have changed."""

from __future__ import annotations

from pathlib import Path

from gptb_ds.checkpoint.format import CheckpointError, Manifest

# What runs had before there was the key: a checkpoint from then does not name it.
_BEFORE = {"task.curriculum": "off"}


def check_identity(manifest: Manifest, identity: dict[str, object], folder: Path) -> None:
    """Raises CheckpointError with one line for each thing that must be the same and is not, both values named."""
    saved = {key: value for key, value in manifest.identity.items() if value is not None}
    pairs = [(key, saved.get(key, _BEFORE.get(key)), value) for key, value in identity.items()]
    lines = [
        f"{folder}: {key} was {before!r} when this was saved and is {now!r} now"
        for key, before, now in pairs
        if before != now
    ]
    if lines:
        lines.append("set them back, name another --run.dir, or start anew with --run.resume never")
        raise CheckpointError("\n".join(lines))


def changed_settings(manifest: Manifest, settings: dict[str, object]) -> list[str]:
    """What may change and did, one phrase each. Of a key that there was not yet nobody knows whether it changed."""
    return [
        f"{key} {before!r} -> {settings.get(key)!r}"
        for key, before in sorted(manifest.settings.items())
        if before != settings.get(key)
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
