"""The sources: what `--source` names, as files and data sets in a fixed order."""

from __future__ import annotations

import os
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from gptb_ds.data.tasks import parse_task

_NOT_LIBRARY = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
_WILDCARDS = "*?["
_FileId = tuple[int, int]  # device and inode


@dataclass(frozen=True)
class Reading:
    """How records are read: `split` and `config` of a data set, `separator` between documents of a text file."""

    split: str | None = None
    config: str | None = None
    streaming: bool = False
    separator: str | None = None

    @property
    def of_data_sets(self) -> bool:
        """Whether an option is given that only data sets have."""
        return bool(self.split or self.config or self.streaming)


@dataclass(frozen=True)
class Source:
    """What one `--source` names: `files` that are read one by one, or a data set.

    `kind`: "files"; "task", a generated one; "saved", a folder that `datasets` saved; "loaded", a hub name or a folder
    with the hub's layout.
    A data set's `files` are there only to notice when they change.
    """

    kind: Literal["files", "saved", "loaded", "task"]
    name: str
    files: tuple[Path, ...] = ()


@dataclass
class Finding:
    """The sources that names stand for, and what a person should know of how they were found."""

    sources: list[Source] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def shown(path: str | Path) -> str:
    """A path as text that can be printed: bytes of its name that are not UTF-8 as escapes."""
    return os.fsencode(path).decode(errors="backslashreplace")


def find_sources(names: list[str], reading: Reading) -> Finding:
    """What `names` stand for: files, globs, folders, saved data sets, hub names, `stdlib`. The order is fixed.

    Links are followed, and every file is read once, under however many names it is found. Raises ValueError with one
    line for each name that stands for nothing.
    """
    found, errors = Finding(), []
    seen: dict[_FileId | str, str] = {}
    for name in names:
        try:
            source = _find(name, reading, found.notes)
        except ValueError as error:
            errors.append(str(error))
            continue
        if source.kind == "files":
            fresh = _once(source.files, seen)
            if len(fresh) < len(source.files):
                kept = set(fresh)
                twice = next(file for file in source.files if file not in kept)
                count = len(source.files) - len(fresh)
                found.notes.append(f"{count} file(s) were named before and are read once, such as {shown(twice)}")
            source = Source("files", source.name, fresh)
        elif seen.setdefault(_place(name), name) != name or source in found.sources:
            found.notes.append(f"{shown(name)} was named more than once and is read once")
            continue
        if source.kind != "files" or source.files:
            found.sources.append(source)
    if reading.of_data_sets and found.sources and all(source.kind in ("files", "task") for source in found.sources):
        errors.append("--split, --name and --streaming are for data sets; files are read whole")
    if len(found.sources) > 1 and any(source.kind == "task" for source in found.sources):
        errors.append("--source task:NAME: has its own vocabulary; give it alone")
    if errors:
        raise ValueError("\n".join(errors))
    return found


def _find(name: str, reading: Reading, notes: list[str]) -> Source:
    path = Path(name).expanduser()
    if name == "stdlib":
        return _standard_library()
    if name.startswith("task:"):
        parse_task(name)
        return Source("task", name)
    if path.is_file():
        return Source("files", name, (path,))
    if path.is_dir():
        files = tuple(files_below(path, notes))
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return Source("saved", name, files)
        if reading.of_data_sets:
            return Source("loaded", name, files)
        if not files:
            raise ValueError(f"--source {shown(name)}: the folder has no files")
        return Source("files", name, files)
    if any(sign in name for sign in _WILDCARDS):
        files = tuple(_once(sorted(_matches(path), key=_sort_key), {}))
        if not files:
            raise ValueError(f"--source {shown(name)}: no file matches")
        return Source("files", name, files)
    file_like = re.search(r"\.(txt|md|py|jsonl?|ndjson|csv|tsv|parquet|arrow|gz|zst|bz2|xz)$", name)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith(".") and not file_like:
        return Source("loaded", name)
    raise ValueError(f"--source {shown(name)}: no such file or folder (data sets of the hub are named OWNER/NAME)")


def _standard_library() -> Source:
    root = Path(sysconfig.get_path("stdlib"))
    files = (p for p in root.rglob("*.py") if not _NOT_LIBRARY & set(p.relative_to(root).parts))
    return Source("files", "stdlib", tuple(sorted(files)))


def files_below(folder: Path, notes: list[str]) -> list[Path]:
    """All files in a folder and below, sorted by their paths; hidden ones and those in hidden folders left out.

    Links are followed, each real folder and file once: a folder that is met first by its own path and then through a
    link counts under its own path. Links that lead nowhere are noted. Raises ValueError when a folder can't be read.
    """
    files: list[Path] = []
    visited: set[_FileId] = set()
    seen_files: set[_FileId] = set()
    dangling: list[Path] = []
    links: list[Path] = []

    def visit(root: Path) -> None:
        stack = [root]
        while stack:
            place = stack.pop()
            status = place.stat()
            if (status.st_dev, status.st_ino) in visited:
                continue
            visited.add((status.st_dev, status.st_ino))
            for entry in _entries(place):
                if entry.name.startswith("."):
                    continue
                if entry.is_symlink():
                    links.append(place / entry.name)
                elif entry.is_dir():
                    stack.append(place / entry.name)
                elif entry.is_file():
                    add(place / entry.name, entry.stat())

    def add(file: Path, status: os.stat_result) -> None:
        if (status.st_dev, status.st_ino) not in seen_files:
            seen_files.add((status.st_dev, status.st_ino))
            files.append(file)

    visit(folder)
    while links:  # after everything that has a path of its own; a linked folder may hold more links
        batch, links = sorted(links, key=_sort_key), []
        for link in batch:
            if link.is_dir():
                visit(link)
            elif link.is_file():
                add(link, link.stat())
            elif not link.exists():
                dangling.append(link)
    if dangling:
        notes.append(f"{len(dangling)} link(s) lead nowhere and are left out, such as {shown(dangling[0])}")
    return sorted(files, key=_sort_key)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: os.fsencode(entry.name))
    except OSError as error:
        raise ValueError(
            f"{shown(folder)}: cannot be read ({error.strerror}); change its rights, or leave it out"
        ) from None


def _sort_key(path: Path) -> tuple[str, ...]:
    return path.parts


def _matches(pattern: Path) -> Iterator[Path]:
    """The files that a glob matches, through links too; a linked folder is not entered from inside itself.

    `glob.glob` of Python 3.11 enters it until the system refuses, 40 levels deep.
    """
    parts = pattern.parts
    start = Path(parts[0]) if pattern.is_absolute() else Path()
    return _expand(start, parts[1:] if pattern.is_absolute() else parts, ())


def _expand(folder: Path, parts: tuple[str, ...], inside: tuple[_FileId, ...]) -> Iterator[Path]:
    first, rest = parts[0], parts[1:]
    if first != "**" and not any(sign in first for sign in _WILDCARDS):
        path = folder / first
        if rest and path.is_dir():
            yield from _expand(path, rest, ())
        elif not rest and path.is_file():
            yield path
        return
    status = folder.stat()
    identity = (status.st_dev, status.st_ino)
    if identity in inside:
        return
    if first == "**" and rest:
        yield from _expand(folder, rest, inside)
    for entry in _entries(folder):
        if entry.name.startswith(".") and not first.startswith("."):
            continue
        path = folder / entry.name
        if first == "**":
            if entry.is_dir():
                yield from _expand(path, parts, (*inside, identity))
            elif not rest and entry.is_file():
                yield path
        elif fnmatchcase(entry.name, first):
            if rest and entry.is_dir():
                yield from _expand(path, rest, ())
            elif not rest and entry.is_file():
                yield path


def _once(files: tuple[Path, ...] | list[Path], seen: dict[_FileId | str, str]) -> tuple[Path, ...]:
    """The files that are not in `seen` yet; they are put there."""
    fresh = []
    for file in files:
        status = file.stat()
        # Some file systems have no inodes.
        identity = (status.st_dev, status.st_ino) if status.st_ino else str(file.resolve())
        if identity not in seen:
            seen[identity] = str(file)
            fresh.append(file)
    return tuple(fresh)


def _place(name: str) -> str:
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name
