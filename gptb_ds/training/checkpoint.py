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
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from gptb_ds.files import sha256_of
from gptb_ds.training.world import World

FORMAT = 1
_FOLDER = re.compile(r"step-(\d{8,})")
_FILE = re.compile(r"(model|optimizer|lanes|rng)-[\w.-]+\.safetensors")


class CheckpointError(ValueError):
    """A checkpoint that can't be used: the message says which, and why."""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds. `identity` must equal the resuming run's; `setting` may differ and is logged."""

    step: int
    tokens: int
    loss: float | None
    world_size: int
    zero_stage: int
    lanes: int
    window: int
    identity: dict[str, Any]
    setting: dict[str, Any]
    progress: dict[str, Any]
    versions: dict[str, str]
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
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

    Raises CheckpointError naming the folder and the reason.
    """
    try:
        body = json.loads((folder / "manifest.json").read_bytes())
        checksum = body.pop("checksum")
        if body.get("format") != FORMAT:
            raise CheckpointError(f"{folder}: format {body.get('format')!r}, this version reads {FORMAT}")
        if checksum != _checksum(body):
            raise CheckpointError(f"{folder}: manifest.json was altered")
        manifest = Manifest(**body)
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no manifest.json, the save was not completed") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{folder}: manifest.json cannot be read: {error!r}") from None
    for name, entry in manifest.files.items():
        if not _FILE.fullmatch(name):
            raise CheckpointError(f"{folder}: the manifest names {name!r}, which is no file of a checkpoint")
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size != entry["bytes"]:
            what = "is missing" if size is None else f"has {size} bytes"
            raise CheckpointError(f"{folder}: {name} {what}, the manifest says {entry['bytes']}")
    return manifest


def check_content(folder: Path, manifest: Manifest, names: Iterable[str] | None = None) -> None:
    """Raises CheckpointError naming the first of the files whose checksum differs from the manifest's."""
    for name in manifest.files if names is None else names:
        try:
            found = sha256_of(folder / name)
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
    manifest = world.on_first(read_manifest, folder)
    problem = None
    try:
        check_content(folder, manifest, list(manifest.files)[world.rank :: world.size])
    except CheckpointError as error:
        problem = str(error)
    for found in world.gather(problem):
        if found is not None:
            raise CheckpointError(found)
    return manifest


def newest_good(run: Path, world: World) -> tuple[Path | None, list[str]]:
    """The newest checkpoint of the run that verifies (None if none does), and why newer ones were passed over."""
    passed_over = []
    for folder in world.on_first(checkpoint_folders, run):
        try:
            verify_together(folder, world)
        except CheckpointError as error:
            passed_over.append(str(error))
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
    """Tensors of one checkpoint, read when asked for; nothing is loaded whole."""

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

        Raises CheckpointError when a lane is missing or a tensor is not of shape (lanes, *state_shape) or (lanes,).
        """
        parts: dict[str, list[torch.Tensor]] = {"state": [], "ordinal": [], "offset": []}
        at = start
        for first, last, name in self._lane_files:
            low, high = max(first, at), min(last, stop)
            if first <= at and low < high:
                for key, pieces in parts.items():
                    piece = self._file(name).get_slice(key)
                    want = (last - first, *(state_shape if key == "state" else ()))
                    if tuple(piece.get_shape()) != want:
                        raise CheckpointError(
                            f"{self.folder}: {name}: {key} has shape {tuple(piece.get_shape())}, the run needs {want}"
                        )
                    pieces.append(piece[low - first : high - first])
                at = high
        if at != stop:
            raise CheckpointError(f"{self.folder}: lane {at} is in no file")
        return {key: torch.cat(pieces) for key, pieces in parts.items()}

    def random_state(self, rank: int) -> dict[str, torch.Tensor]:
        """The random state that `rank` had, by device type."""
        for name in self.manifest.files:
            if name.startswith("rng-"):
                start, stop = (int(part) for part in name.removesuffix(".safetensors").split("-")[1:])
                if start <= rank < stop:
                    return {key: self._file(name).get_slice(key)[rank - start] for key in self._file(name).keys()}
        raise CheckpointError(f"{self.folder}: no random state of rank {rank}")

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
