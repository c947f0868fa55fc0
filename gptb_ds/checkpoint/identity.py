"""What a resumed run must share with the run that saved, and what may have changed."""

from __future__ import annotations

from pathlib import Path

from gptb_ds.checkpoint.format import CheckpointError, Manifest

# Where parts of the identity come from that are no keys of the configuration; those not named here are a decoder's.
_SOURCES = {
    "data": "the stores in data.path",
    **dict.fromkeys(("tokenizer", "vocab_size", "eot_id"), "the first store in data.path"),
}


def check_identity(manifest: Manifest, identity: dict[str, object], folder: Path) -> None:
    """Raises CheckpointError with one line for each thing that must be the same and is not, both values named."""
    saved = _as_now(manifest.identity, identity)
    lines = [
        f"{folder}: {key} was {saved.get(key)!r} when this was saved and is {value!r} now{_source(key)}"
        for key, value in identity.items()
        if saved.get(key) != value
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


def _as_now(saved: dict[str, object], identity: dict[str, object]) -> dict[str, object]:
    """A saved identity with the keys that it lacks, because there were none when it was saved."""
    now = {key: value for key, value in saved.items() if value is not None}
    # Whether lanes were out of step was a part of the data's fingerprint only.
    other = {"on": "off", "off": "on"}.get(str(identity.get("data.stagger")))
    stagger = identity.get("data.stagger") if saved.get("data") == identity.get("data") else other
    # A decoder that a model begins as shows in its shapes alone, which are checked by themselves.
    init_from = identity.get("model.init_from")
    return {"task.curriculum": "off", "data.stagger": stagger, "model.init_from": init_from} | now


def _source(key: str) -> str:
    """Where it comes from, in brackets, when it is no key of the configuration."""
    if "." in key and not key.startswith("backbone."):
        return ""
    return f" (it comes from {_SOURCES.get(key, 'the decoder in model.backbone or model.init_from')})"
