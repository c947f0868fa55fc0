"""Reading a checkpoint: tensors by name and by global lane, whichever ranks wrote them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, cast

import torch
from safetensors import SafetensorError, safe_open

from gptb_ds.checkpoint.format import CheckpointError, read_manifest
from gptb_ds.distributed.world import World


class _Slice(Protocol):
    """A tensor of a safetensors file, of which only the asked part is read. The library's own stubs have no types."""

    def get_shape(self) -> list[int]: ...
    def get_dtype(self) -> str: ...
    def __getitem__(self, index: int | slice) -> torch.Tensor: ...


class _File(Protocol):
    """An open safetensors file."""

    def keys(self) -> list[str]: ...
    def get_tensor(self, name: str) -> torch.Tensor: ...
    def get_slice(self, name: str) -> _Slice: ...


class CheckpointReader:
    """Tensors of one checkpoint, read when asked for; nothing is loaded whole. `close` lets its files go."""

    def __init__(self, folder: Path) -> None:
        """Raises CheckpointError when a file's header can't be read."""
        self.folder = folder
        self.manifest = read_manifest(folder)
        self._where: dict[tuple[str, str], str] = {}
        self._open: dict[str, _File] = {}
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

    def check_model(
        self,
        wanted: dict[str, tuple[int, ...]],
        moments: Callable[[str], Sequence[str]] | None = lambda name: ("exp_avg", "exp_avg_sq"),
    ) -> None:
        """Raises CheckpointError unless weights and moments are float32 and have the names and shapes `wanted`.

        `moments` are the kinds of moments that a parameter has. None: they are not wanted, whatever they are.
        """
        expected = {("model", name): shape for name, shape in wanted.items()}
        if moments is not None:
            for name, shape in wanted.items():
                expected |= {("optimizer", f"{moment}/{name}"): shape for moment in moments(name)}
        there = {(kind, key) for kind, key in self._where if kind == "model" or moments}
        for kind, key in sorted(expected.keys() ^ there):
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

    def fetch_together(self, world: World, kind: str, name: str) -> torch.Tensor:
        """`fetch` on every rank, in the same order: rank 0 alone reads, the others are sent it, on the world's device.

        A thousand ranks that each read 15 GB of weights and moments would keep a file system busy for an hour.
        """
        where = ("model", name) if kind == "weight" else ("optimizer", f"{kind}/{name}")
        tensor = self.fetch(kind, name) if world.rank == 0 else torch.empty(self._shape(*where))
        return world.broadcast_tensor(tensor)

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

    def _piece(self, name: str, key: str) -> _Slice:
        if key not in self._file(name).keys():
            raise CheckpointError(f"{self.folder}: {name} lacks the tensor {key!r}")
        return self._file(name).get_slice(key)

    def _file(self, name: str) -> _File:
        if name not in self._open:
            try:
                self._open[name] = cast("_File", safe_open(str(self.folder / name), "pt"))
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{self.folder}: {name} is not a safetensors file: {error}") from None
        return self._open[name]

    def _slice(self, kind: str, key: str) -> _Slice:
        return self._file(self._where[kind, key]).get_slice(key)

    def _shape(self, kind: str, key: str) -> tuple[int, ...]:
        return tuple(self._slice(kind, key).get_shape())
