"""The memory-mapped document store: its layout on disk, how it is checked on opening, and reading it.

    STORE/store.json                  manifest, written last: counts, size and checksum of every file, fingerprint
    STORE/tokenizer/                  the tokenizer, as transformers saves it
    STORE/{train,validation}/tokens.bin    EOT and tokens of each document, one after another, and one closing EOT
    STORE/{train,validation}/offsets.bin   int64 (N+1): where each document's EOT lies in tokens.bin
    STORE/{train,validation}/counted.bin   uint8 beside tokens.bin, only with loss weights: 1 = counts as a target
    STORE/{train,validation}/targets.bin   ids beside tokens.bin, only of generated tasks: what each input's target is

So the target of the input at position p is the token at p+1, for the last token of a document the next one's EOT; where
there is a targets.bin, it is what stands there at p.
Axes: N documents of a split.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Annotated,
    Literal,
    NotRequired,  # pydantic takes typing's from Python 3.12 on
)

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from gptb_ds.atomic_files import sha256_of

if TYPE_CHECKING:
    from gptb_ds.data.tokenization import Tokenizer
from gptb_ds.data.tokenization import load_folder

FORMAT = "gptb-ds store 1"
SPLITS = ("train", "validation")


Count = Annotated[int, Field(ge=0)]


class StoreFileFacts(TypedDict):
    """Size, checksum of the whole, and checksum of the blocks that opening reads."""

    size: Count
    sha256: str
    sample: str


class SplitFacts(TypedDict):
    """Counts of one split. `histogram`: documents by length, below 1, 2, 4, 8, .. tokens."""

    documents: Count
    tokens: Count
    bytes: Count
    counted: Count
    longest: Count
    histogram: list[int]


class Origin(TypedDict):
    """Where a store comes from: the checksum of inputs and options, and the sources for people."""

    recipe: str
    sources: list[str]


class StoreContent(Origin):
    """What a store holds."""

    tokenizer: str
    tokenizer_fingerprint: str
    vocab_size: Count
    eot_id: Count
    dtype: Literal["uint16", "uint32"]
    weighted: bool
    own_targets: NotRequired[bool]
    read_as: NotRequired[str]
    splits: dict[str, SplitFacts]
    skipped: dict[str, int]


@with_config(ConfigDict(strict=True))
class StoreManifest(StoreContent):
    """`store.json`: what the store holds, and what its files must be."""

    format: str
    files: dict[str, StoreFileFacts]
    fingerprint: str
    manifest_checksum: str


_BLOCK = 1 << 16
_BLOCKS = 256
_CHUNK = 1 << 24


class DocumentStore:
    """One split of a store, opened. The token files are mapped, not read: memory does not grow with the corpus.

    `tokens` (num_tokens + N + 1) uint16 or uint32, `offsets` (N+1) int64, `counted` like `tokens` or None.
    """

    def __init__(self, path: Path, split: str, manifest: StoreManifest) -> None:
        facts = manifest["splits"][split]
        self.path, self.split, self.manifest = path, split, manifest
        self.fingerprint = hashlib.sha256(f"{manifest['fingerprint']}/{split}".encode()).hexdigest()[:32]
        self.tokenizer: str = manifest["tokenizer"]
        self.tokenizer_fingerprint: str = manifest["tokenizer_fingerprint"]
        self.vocab_size: int = manifest["vocab_size"]
        self.eot_id: int = manifest["eot_id"]
        self.num_documents: int = facts["documents"]
        self.num_tokens: int = facts["tokens"]
        self.num_bytes: int = facts["bytes"]
        self.tokens = _map(path / split / "tokens.bin", manifest["dtype"], scattered=True)
        self.offsets: npt.NDArray[np.int64] = _map(path / split / "offsets.bin", "int64").view(np.int64)
        self.counted = None
        if manifest["weighted"]:
            self.counted = _map(path / split / "counted.bin", "uint8", scattered=True)
        self.targets = None
        if manifest.get("own_targets"):
            self.targets = _map(path / split / "targets.bin", manifest["dtype"], scattered=True)

    def document(self, index: int) -> npt.NDArray[np.integer]:
        """The tokens (n,) of one document, without its EOT."""
        return self.tokens[self.offsets[index] + 1 : self.offsets[index + 1]]


def open_store(path: str | Path, split: str = "train") -> DocumentStore:
    """Opens one split of a store made by `gptb-ds prepare`.

    What opening guarantees: the manifest is whole and unaltered; every file of the split and of the tokenizer has its
    size; files up to 16 MiB have their checksum; of larger ones 256 blocks of 64 KiB, the first, the last and evenly
    spread ones, have theirs. So a truncated, mixed up, regenerated or shifted file is noticed; a few flipped bytes in a
    large file are noticed by `verify_store`, which reads everything.

    Raises ValueError, in one line, when there is no store, it is incomplete or altered, or the split has no documents.
    """
    path = Path(path)
    manifest = read_store_manifest(path)
    if split not in manifest["splits"]:
        raise ValueError(f"{path}: no split '{split}'; choose one of {', '.join(SPLITS)}")
    if not manifest["splits"][split]["documents"]:
        hint = "; prepare it with a larger --holdout" if split == "validation" else ""
        raise ValueError(f"{path}: the split '{split}' has no documents{hint}")
    for name, facts in manifest["files"].items():
        if name.split("/")[0] in (split, "tokenizer"):
            _check_file(path, name, facts)
    _check_split(path, split, manifest)
    store = DocumentStore(path, split, manifest)
    if int(store.offsets[0]) != 0 or int(store.offsets[-1]) + 1 != len(store.tokens):
        raise ValueError(f"{path}: {split}/offsets.bin does not belong to its tokens.bin; prepare the store again")
    return store


def read_store_manifest(path: Path) -> StoreManifest:
    """The manifest of a store, checked against its own fingerprint. Raises ValueError, in one line."""
    try:
        manifest: StoreManifest = json.loads((path / "store.json").read_text())
    except NotADirectoryError:
        raise ValueError(f"{path}: is a file, not a document store; run gptb-ds prepare on it") from None
    except FileNotFoundError:
        hint = "an interrupted prepare leaves none" if path.is_dir() else "there is no such folder"
        raise ValueError(f"{path}: not a document store, store.json is missing ({hint}); run gptb-ds prepare") from None
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{path}/store.json: cannot be read ({error}); prepare the store again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{path}/store.json: not of the format '{FORMAT}'; prepare the store again")
    if manifest.get("manifest_checksum") != manifest_checksum(manifest):
        raise ValueError(f"{path}/store.json: altered since it was written; prepare the store again")
    try:
        _MANIFEST.validate_python(manifest)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:3])
        raise ValueError(f"{path}/store.json: cannot be read ({wrong}); prepare the store again") from None
    if missing := [split for split in SPLITS if split not in manifest["splits"]]:
        raise ValueError(f"{path}/store.json: lacks the split '{missing[0]}'; prepare the store again")
    return manifest


_MANIFEST = TypeAdapter(StoreManifest)


def _check_split(path: Path, split: str, manifest: StoreManifest) -> None:
    """Raises ValueError, in one line, unless the counts in the manifest are those of the split's files."""
    facts, files = manifest["splits"][split], manifest["files"]
    targets = facts["tokens"] + facts["documents"] + 1
    width = 2 if manifest["dtype"] == "uint16" else 4
    sizes = {"tokens.bin": targets * width, "offsets.bin": (facts["documents"] + 1) * 8}
    if manifest["weighted"]:
        sizes["counted.bin"] = targets
    if manifest.get("own_targets"):
        sizes["targets.bin"] = targets * width
    for name, size in sizes.items():
        found = files.get(f"{split}/{name}")
        if found is None or found["size"] != size:
            raise ValueError(
                f"{path}/store.json: says {facts['documents']} documents of {facts['tokens']} tokens, which"
                f" {split}/{name} does not hold; prepare the store again"
            )
    if manifest["eot_id"] >= manifest["vocab_size"]:
        raise ValueError(f"{path}/store.json: eot_id is beyond vocab_size; prepare the store again")


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The transformers tokenizer that is saved in a store. Needs no network."""
    read_store_manifest(Path(path))
    return load_folder(Path(path) / "tokenizer")


def verify_store(path: str | Path) -> None:
    """Reads a whole store: every checksum, ascending offsets, EOT at every start, token ids inside the vocabulary.

    Raises ValueError, in one line, for the first thing that is wrong.
    """
    path = Path(path)
    manifest = read_store_manifest(path)
    for name, facts in manifest["files"].items():
        _check_file(path, name, facts)
        if sha256_of(path / name) != facts["sha256"]:
            raise ValueError(f"{path / name}: altered since the store was written; prepare the store again")
    for split in SPLITS:
        if not manifest["splits"][split]["documents"]:
            continue
        store = DocumentStore(path, split, manifest)
        for first in range(0, len(store.tokens), _CHUNK):
            # Read in order, not through the map, which expects scattered reading.
            offset = first * store.tokens.itemsize
            tokens = np.fromfile(path / split / "tokens.bin", store.tokens.dtype, _CHUNK, offset=offset)
            if tokens.max() >= store.vocab_size:
                raise ValueError(f"{path}/{split}: a token near {first} is beyond the vocabulary ({store.vocab_size})")
            low, high = np.searchsorted(store.offsets, (first, first + len(tokens)))
            starts = store.offsets[low:high]
            if (np.diff(starts) < 1).any() or (tokens[starts - first] != store.eot_id).any():
                raise ValueError(f"{path}/{split}: documents near number {low} do not start with EOT")


def manifest_checksum(manifest: Mapping[str, object]) -> str:
    """Checksum of a manifest without its checksum."""
    content = {key: value for key, value in manifest.items() if key != "manifest_checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def file_facts(path: Path) -> StoreFileFacts:
    """What the manifest says of a file: size, checksum of the whole, checksum of the blocks that opening reads."""
    return {"size": path.stat().st_size, "sha256": sha256_of(path), "sample": digest_sample(path)}


def digest_sample(path: Path) -> str:
    """SHA-256 of at most 256 blocks of 64 KiB: all of a file up to 16 MiB, evenly spread blocks of a larger one."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for start in _sample_starts(path.stat().st_size):
            file.seek(start)
            digest.update(file.read(_BLOCK))
    return digest.hexdigest()


def _sample_starts(size: int) -> Iterator[int]:
    if size <= _BLOCK * _BLOCKS:
        yield from range(0, size, _BLOCK)
    else:
        yield from ((size - _BLOCK) * block // (_BLOCKS - 1) for block in range(_BLOCKS))


def _check_file(path: Path, name: str, facts: StoreFileFacts) -> None:
    file = path / name
    if not file.is_file():
        raise ValueError(f"{file}: missing; prepare the store again")
    if file.stat().st_size != facts["size"]:
        raise ValueError(
            f"{file}: has {file.stat().st_size} bytes instead of {facts['size']} (truncated or altered);"
            " prepare the store again"
        )
    if digest_sample(file) != facts["sample"]:
        raise ValueError(f"{file}: altered since the store was written; prepare the store again")


def _map(path: Path, dtype: str, scattered: bool = False) -> npt.NDArray[np.integer]:
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if scattered and hasattr(mmap, "MADV_RANDOM"):
        # Each lane reads elsewhere: reading ahead for every one of them would fetch megabytes for a few hundred bytes.
        mapped.madvise(mmap.MADV_RANDOM)
    return np.frombuffer(mapped, dtype=dtype)
