"""The checkpoint format: manifest, verification, listing and reading. No pickle is written or read.

RUN/checkpoints/step-00001000/
    model-*.safetensors      fp32 master weights by parameter name
    optimizer-*.safetensors  Adam moments: "exp_avg/NAME", "exp_avg_sq/NAME"
    lanes-*.safetensors      state (lanes, S-1, E), ordinal and offset (lanes,), by global lane range
    rng-*.safetensors        random state of a range of ranks, (ranks, bytes)
    config.json, tokenizer/  the model's configuration and the tokenizer, as transformers saves them
    manifest-copy.json       the same as manifest.json, which is read when that one is lost
    manifest.json            written last: no manifest, no checkpoint

The folder is all that a model needs: copied elsewhere, it evaluates, generates and exports.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, field
from pathlib import Path
from typing import TypeAlias

from pydantic import ConfigDict, NonNegativeInt, PositiveInt, ValidationError
from pydantic.dataclasses import dataclass
from typing_extensions import TypedDict  # typing's is not enough for pydantic before Python 3.12

from gptb_ds.atomic_files import sha256_of
from gptb_ds.distributed.watchdog import progress_made
from gptb_ds.distributed.world import World

FORMAT = 3
# One of a run's counters, as JSON has it.
Counter: TypeAlias = int | float | bool | list[int] | list[list[int]] | None
# Versions of this package that read an older format.
_READ_BY = {1: "gptb-ds 0.1", 2: "gptb-ds 0.1"}
MANIFEST, MANIFEST_COPY = "manifest.json", "manifest-copy.json"
_FOLDER = re.compile(r"step-(\d{8,})")
_FILE = re.compile(r"((model|optimizer)-[\w.-]+|(lanes|rng)-\d+-\d+)\.safetensors|config\.json|tokenizer(/\w[\w.-]*)+")


class CheckpointError(ValueError):
    """A checkpoint that can't be used: the message says which, and why."""


class UnreadableError(CheckpointError):
    """One that may be whole, but that this version or this user can't read: not damage to be passed over."""


class FileFacts(TypedDict):
    """Size and SHA-256 of a file."""

    bytes: int
    sha256: str


@dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid", allow_inf_nan=False))
class Manifest:
    """What a checkpoint holds. `identity` must equal the resuming run's; `settings` may differ and are logged.

    `progress` are the counters of the run by name (`TrainState` knows which), `scaler` is fp16's loss scale.
    """

    step: NonNegativeInt
    tokens: NonNegativeInt
    loss: float | None
    world_size: PositiveInt
    zero_stage: NonNegativeInt
    lanes: PositiveInt
    window: PositiveInt
    identity: dict[str, object]
    settings: dict[str, object]
    progress: dict[str, Counter]
    versions: dict[str, str]
    files: dict[str, FileFacts] = field(default_factory=dict)
    scaler: dict[str, int | float] = field(default_factory=dict)
    format: int = FORMAT

    def to_json(self) -> bytes:
        body = asdict(self)
        return json.dumps(body | {"checksum": _checksum(body)}, indent=1).encode()


def _checksum(body: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def checkpoint_folder(run: Path, step: int) -> Path:
    """Where the checkpoint after `step` updates lies."""
    return run / "checkpoints" / f"step-{step:08d}"


def checkpoint_folders(run: Path) -> list[Path]:
    """The run's checkpoint folders, newest first, whole or not."""
    if not (run / "checkpoints").is_dir():
        return []
    found = [(int(match[1]), p) for p in (run / "checkpoints").iterdir() if (match := _FOLDER.fullmatch(p.name))]
    return [path for _, path in sorted(found, reverse=True)]


def has_manifest(folder: Path) -> bool:
    """Whether the folder is, or was, a complete checkpoint."""
    return (folder / MANIFEST).exists() or (folder / MANIFEST_COPY).exists()


def has_lost_its_manifest(folder: Path) -> bool:
    """Whether files of every kind lie there and only the manifests are missing: too good to be overwritten.

    An interrupted save looks like this for a moment only: the moments are written last, then the manifests.
    """
    kinds = ("model", "optimizer", "lanes", "rng")
    return not has_manifest(folder) and all(any(folder.glob(f"{kind}-*.safetensors")) for kind in kinds)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint whose files have the right sizes; their content is not read.

    Raises CheckpointError naming the folder and the reason; UnreadableError for another format, or no permission.
    """
    manifest = _parse(folder, MANIFEST if (folder / MANIFEST).exists() else MANIFEST_COPY)
    if (named := _FOLDER.fullmatch(folder.name)) and int(named[1]) != manifest.step:
        raise CheckpointError(f"{folder}: manifest.json is of update {manifest.step}")
    # A window is read by one update, or by several that take a part of its lanes each.
    windows, rest = divmod(manifest.tokens, manifest.lanes * manifest.window)
    if rest or windows > manifest.step or (manifest.step and not windows):
        raise CheckpointError(
            f"{folder}: manifest.json says {manifest.tokens} tokens, which {manifest.step} updates can't have read in"
            f" windows of {manifest.lanes} lanes x {manifest.window} columns"
        )
    for name, entry in manifest.files.items():
        if not _FILE.fullmatch(name):
            raise CheckpointError(f"{folder}: the manifest names {name!r}, which is no file of a checkpoint")
        try:
            size = (folder / name).stat().st_size
        except OSError:
            size = None
        if size != entry["bytes"]:
            what = "is missing" if size is None else f"has {size} bytes"
            raise CheckpointError(f"{folder}: {name} {what}, the manifest says {entry['bytes']}")
    _check_ranges(folder, manifest)
    return manifest


def _check_ranges(folder: Path, manifest: Manifest) -> None:
    """Raises CheckpointError unless the files of lanes and of random states are of all the lanes and ranks."""
    for kind, count in (("lanes", manifest.lanes), ("rng", manifest.world_size)):
        names = [name.removesuffix(".safetensors").split("-") for name in manifest.files if name.startswith(f"{kind}-")]
        at = 0
        for first, last in sorted((int(start), int(stop)) for _, start, stop in names):
            if first != at or last <= first:
                break
            at = last
        if at != count:
            what = "lanes" if kind == "lanes" else "ranks"
            raise CheckpointError(f"{folder}: manifest.json says {count} {what}, its files {kind}-* are of {at}")


def _parse(folder: Path, name: str) -> Manifest:
    """The manifest in the file `name`, unaltered and of this format; `read_manifest` says what is raised."""
    if (folder / name).exists() and not (folder / name).is_file():  # to read a pipe would be to wait for ever
        raise CheckpointError(f"{folder}: {name} cannot be read: it is no file")
    try:
        body = json.loads((folder / name).read_bytes())
        checksum = body.pop("checksum")
        if checksum != _checksum(body):
            raise CheckpointError(f"{folder}: {name} was altered")
        if body.get("format") != FORMAT:
            raise UnreadableError(f"{folder}: {_other_format(body)}")
        return Manifest(**body)
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no manifest.json, the save was not completed") from None
    except PermissionError as error:
        raise UnreadableError(f"{folder}: {name} cannot be read: {error.strerror}") from None
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise CheckpointError(f"{folder}: {name} cannot be read: {wrong}") from None
    except CheckpointError:
        raise
    # RecursionError: what json raises for thousands of brackets. Not caught, it would end this rank alone.
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{folder}: {name} cannot be read: {error!r}") from None


def _other_format(body: dict[str, object]) -> str:
    found, versions = body.get("format"), body.get("versions")
    reader = _READ_BY.get(found) if isinstance(found, int) else None
    if reader is not None:
        remedy = f"; {reader} reads it"
    elif isinstance(versions, dict) and "gptb-ds" in versions:
        remedy = f"; it was written by gptb-ds {versions['gptb-ds']}"
    else:
        remedy = ""
    return f"format {found!r}, this version reads {FORMAT}{remedy}"


def check_content(
    folder: Path,
    manifest: Manifest,
    names: Iterable[str] | None = None,
) -> None:
    """Raises CheckpointError naming the first of the files whose checksum differs from the manifest's."""
    for name in manifest.files if names is None else names:
        try:
            found = sha256_of(folder / name)
            progress_made(f"reading {name}")
        except PermissionError as error:
            raise UnreadableError(f"{folder}: {name} cannot be read: {error.strerror}") from None
        except OSError as error:
            raise CheckpointError(f"{folder}: {name} cannot be read: {error}") from None
        if found != manifest.files[name]["sha256"]:
            raise CheckpointError(f"{folder}: {name} was altered, its checksum differs from the manifest's")


def verify(folder: Path) -> Manifest:
    """The manifest of a checkpoint that is whole, every byte. Raises CheckpointError."""
    manifest = read_manifest(folder)
    check_content(folder, manifest)
    return manifest


def verify_together(folder: Path, world: World) -> Manifest:
    """`verify`, with the reading shared among the ranks; all return, or all raise CheckpointError."""
    manifest = world.on_rank0(read_manifest, folder)
    problem = None
    try:
        check_content(folder, manifest, list(manifest.files)[world.rank :: world.size])
    except CheckpointError as error:
        problem = error
    for found in world.all_gather(problem):
        if found is not None:
            raise found
    return manifest


def newest_good(run: Path, world: World) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint of the run that verifies (None if none does), and why newer ones were passed over.

    Raises UnreadableError for one that may be good but can't be read here: to go back behind it would be a mistake.
    """
    passed_over = {}
    for folder in world.on_rank0(checkpoint_folders, run):
        try:
            verify_together(folder, world)
        except UnreadableError:
            raise
        except CheckpointError as error:
            passed_over[folder] = str(error)
        else:
            return folder, passed_over
    return None, passed_over


def list_checkpoints(run: Path) -> Iterator[tuple[Path, Manifest | CheckpointError]]:
    """The run's checkpoints, newest first: what each holds, or why it can't be used. Reads every byte."""
    for folder in checkpoint_folders(run):
        try:
            yield folder, verify(folder)
        except CheckpointError as error:
            yield folder, error
