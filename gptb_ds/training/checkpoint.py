"""Owns the checkpoint format: manifest, verification, listing and reading. No pickle is written or read.

RUN/checkpoints/step-00001000/
    model-*.safetensors      fp32 master weights by parameter name
    optimizer-*.safetensors  Adam moments: "exp_avg/NAME", "exp_avg_sq/NAME"
    lanes-*.safetensors      state (lanes, S-1, E), ordinal and offset (lanes,), by global lane range
    rng-*.safetensors        random state of a range of ranks, (ranks, bytes)
    manifest.json            written last: no manifest, no checkpoint
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict, NonNegativeInt, PositiveInt, ValidationError
from pydantic.dataclasses import dataclass
from safetensors import SafetensorError, safe_open
from typing_extensions import TypedDict  # typing's is not enough for pydantic before Python 3.12

from gptb_ds.files import sha256_of
from gptb_ds.training.world import World

FORMAT = 2
_FOLDER = re.compile(r"step-(\d{8,})")
_FILE = re.compile(r"((model|optimizer)-[\w.-]+|(lanes|rng)-\d+-\d+)\.safetensors")


class CheckpointError(ValueError):
    """A checkpoint that can't be used: the message says which, and why."""


class UnreadableError(CheckpointError):
    """One that may be whole, but that this version or this user can't read: not damage to be passed over."""


class FileFacts(TypedDict):
    """Size and SHA-256 of a file."""

    bytes: int
    sha256: str


class ProgressFacts(TypedDict):
    """Where training stands beside its tensors; `evaluation_due`: a request to stop kept this update's evaluation."""

    adam_steps: int
    skipped: int
    bad_in_row: int
    evaluation_due: bool
    scaler: dict[str, int | float]


@dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid"))
class Manifest:
    """What a checkpoint holds. `identity` must equal the resuming run's; `setting` may differ and is logged."""

    step: NonNegativeInt
    tokens: NonNegativeInt
    loss: float | None
    world_size: PositiveInt
    zero_stage: int
    lanes: PositiveInt
    window: PositiveInt
    identity: dict[str, Any]
    setting: dict[str, Any]
    progress: ProgressFacts
    versions: dict[str, str]
    files: dict[str, FileFacts] = field(default_factory=dict)
    format: int = FORMAT

    def to_json(self) -> bytes:
        body = asdict(self)
        return json.dumps(body | {"checksum": _checksum(body)}, indent=1).encode()


def _checksum(body: dict[str, Any]) -> str:
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


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint whose files have the right sizes; their content is not read.

    Raises CheckpointError naming the folder and the reason; UnreadableError for another format, or no permission.
    """
    try:
        body = json.loads((folder / "manifest.json").read_bytes())
        checksum = body.pop("checksum")
        if checksum != _checksum(body):
            raise CheckpointError(f"{folder}: manifest.json was altered")
        if body.get("format") != FORMAT:
            raise UnreadableError(f"{folder}: format {body.get('format')!r}, this version reads {FORMAT}")
        manifest = Manifest(**body)
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no manifest.json, the save was not completed") from None
    except PermissionError as error:
        raise UnreadableError(f"{folder}: manifest.json cannot be read: {error.strerror}") from None
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise CheckpointError(f"{folder}: manifest.json cannot be read: {wrong}") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{folder}: manifest.json cannot be read: {error!r}") from None
    if (named := _FOLDER.fullmatch(folder.name)) and int(named[1]) != manifest.step:
        raise CheckpointError(f"{folder}: manifest.json is of update {manifest.step}")
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
    return manifest


def check_content(
    folder: Path, manifest: Manifest, names: Iterable[str] | None = None, renew: Callable[[str], None] = lambda _: None
) -> None:
    """Raises CheckpointError naming the first of the files whose checksum differs from the manifest's.

    `renew` is told of each file that was read (see `Watchdog.renew`).
    """
    for name in manifest.files if names is None else names:
        try:
            found = sha256_of(folder / name)
            renew(f"reading {name}")
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


def verify_together(folder: Path, world: World, renew: Callable[[str], None] = lambda _: None) -> Manifest:
    """`verify`, with the reading shared among the ranks; all return, or all raise CheckpointError."""
    manifest = world.on_first(read_manifest, folder)
    problem = None
    try:
        check_content(folder, manifest, list(manifest.files)[world.rank :: world.size], renew)
    except CheckpointError as error:
        problem = error
    for found in world.gather(problem):
        if found is not None:
            raise found
    return manifest


def newest_good(
    run: Path, world: World, renew: Callable[[str], None] = lambda _: None
) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint of the run that verifies (None if none does), and why newer ones were passed over.

    Raises UnreadableError for one that may be good but can't be read here: to go back behind it would be a mistake.
    """
    passed_over = {}
    for folder in world.on_first(checkpoint_folders, run):
        try:
            verify_together(folder, world, renew)
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


class CheckpointReader:
    """Tensors of one checkpoint, read when asked for; nothing is loaded whole. `close` lets its files go."""

    def __init__(self, folder: Path) -> None:
        """Raises CheckpointError when a file's header can't be read."""
        self.folder = folder
        self.manifest = read_manifest(folder)
        self._where: dict[tuple[str, str], str] = {}
        self._open: dict[str, Any] = {}
        self._lane_files: list[tuple[int, int, str]] = []
        for name in self.manifest.files:
            kind = name.split("-")[0]
            if kind in ("model", "optimizer"):
                self._where |= {(kind, key): name for key in self._file(name).keys()}
            elif kind == "lanes":
                start, stop = name.removesuffix(".safetensors").split("-")[1:]
                self._lane_files.append((int(start), int(stop), name))
        self._lane_files.sort()

    def close(self) -> None:
        self._open.clear()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter in the checkpoint."""
        return {key: self._shape(kind, key) for kind, key in self._where if kind == "model"}

    def check_model(self, wanted: dict[str, tuple[int, ...]]) -> None:
        """Raises CheckpointError unless weights and moments are float32 and have the names and shapes `wanted`."""
        expected = {("model", name): shape for name, shape in wanted.items()}
        for moment in ("exp_avg", "exp_avg_sq"):
            expected |= {("optimizer", f"{moment}/{name}"): shape for name, shape in wanted.items()}
        for kind, key in sorted(expected.keys() ^ self._where.keys()):
            where = "the model has no such parameter" if (kind, key) in self._where else "the checkpoint lacks it"
            raise CheckpointError(f"{self.folder}: {kind} tensor {key!r}: {where}")
        for (kind, key), shape in expected.items():
            found, dtype = self._shape(kind, key), self._slice(kind, key).get_dtype()
            if found != shape or dtype != "F32":
                raise CheckpointError(
                    f"{self.folder}: {kind} tensor {key!r} is {dtype} {found}, the model needs F32 {shape}"
                )

    def fetch(self, kind: str, name: str) -> torch.Tensor:
        """The full float32 tensor of `kind` "weight", "exp_avg" or "exp_avg_sq" of a parameter."""
        where = ("model", name) if kind == "weight" else ("optimizer", f"{kind}/{name}")
        return self._file(self._where[where]).get_tensor(where[1])

    def lanes(self, start: int, stop: int, state_shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
        """State, ordinal and offset of the global lanes [start, stop), whichever ranks wrote them.

        Raises CheckpointError when a lane is missing or a tensor is not of shape (lanes, *state_shape) or (lanes,), or
        of another kind of number.
        """
        parts: dict[str, list[torch.Tensor]] = {"state": [], "ordinal": [], "offset": []}
        at = start
        for first, last, name in self._lane_files:
            low, high = max(first, at), min(last, stop)
            if first <= at and low < high:
                for key, pieces in parts.items():
                    piece = self._piece(name, key)
                    want = (last - first, *(state_shape if key == "state" else ()))
                    dtypes = ("F32", "BF16", "F16") if key == "state" else ("I64",)
                    if tuple(piece.get_shape()) != want or piece.get_dtype() not in dtypes:
                        raise CheckpointError(
                            f"{self.folder}: {name}: {key} is {piece.get_dtype()} {tuple(piece.get_shape())}, the run"
                            f" needs {dtypes[0]} {want}"
                        )
                    pieces.append(piece[low - first : high - first])
                at = high
        if at != stop:
            raise CheckpointError(f"{self.folder}: lane {at} is in no file")
        return {key: torch.cat(pieces) for key, pieces in parts.items()}

    def random_state(self, rank: int) -> dict[str, torch.Tensor]:
        """The random state that `rank` had, by device type. Raises CheckpointError when it is none."""
        for name in self.manifest.files:
            if name.startswith("rng-"):
                start, stop = (int(part) for part in name.removesuffix(".safetensors").split("-")[1:])
                if start <= rank < stop:
                    pieces = {key: self._piece(name, key) for key in ("cpu", *self._file(name).keys())}
                    for key, piece in pieces.items():
                        shape = tuple(piece.get_shape())
                        if piece.get_dtype() != "U8" or len(shape) != 2 or shape[0] != stop - start:
                            raise CheckpointError(f"{self.folder}: {name}: {key} is {piece.get_dtype()} {shape}")
                    return {key: piece[rank - start] for key, piece in pieces.items()}
        raise CheckpointError(f"{self.folder}: no random state of rank {rank}")

    def _piece(self, name: str, key: str) -> Any:
        if key not in self._file(name).keys():
            raise CheckpointError(f"{self.folder}: {name} lacks the tensor {key!r}")
        return self._file(name).get_slice(key)

    def _file(self, name: str) -> Any:
        if name not in self._open:
            try:
                self._open[name] = safe_open(str(self.folder / name), "pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{self.folder}: {name} is not a safetensors file: {error}") from None
        return self._open[name]

    def _slice(self, kind: str, key: str) -> Any:
        return self._file(self._where[kind, key]).get_slice(key)

    def _shape(self, kind: str, key: str) -> tuple[int, ...]:
        return tuple(self._slice(kind, key).get_shape())


def check_identity(manifest: Manifest, identity: dict[str, Any], folder: Path) -> None:
    """Raises CheckpointError with one line for each thing that must be the same and is not, both values named."""
    lines = [
        f"{folder}: {key} was {manifest.identity.get(key)!r} when this was saved and is {value!r} now"
        for key, value in identity.items()
        if manifest.identity.get(key) != value
    ]
    if lines:
        lines.append("set them back, name another --run.dir, or start anew with --run.resume never")
        raise CheckpointError("\n".join(lines))


def changed_settings(manifest: Manifest, setting: dict[str, Any]) -> list[str]:
    """What may change and did, one phrase each."""
    keys = sorted(manifest.setting.keys() | setting.keys())
    return [
        f"{key} {manifest.setting.get(key)!r} -> {setting.get(key)!r}"
        for key in keys
        if manifest.setting.get(key) != setting.get(key)
    ]
