"""The sources: what `--source` names, as files and data sets in a fixed order."""

from __future__ import annotations

import errno
import os
import re
import stat
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
    """A path as text for one line: what is not UTF-8, or would move a terminal's cursor, as escapes."""
    text = os.fsencode(path).decode(errors="backslashreplace")
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


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
    if not name:
        raise ValueError("--source '': is empty (a variable that is not set?); name a file or a folder")
    if name == "stdlib":
        return _standard_library()
    if name.startswith("task:"):
        parse_task(name)
        return Source("task", name)
    path = Path(name).expanduser()
    what, _ = _what(path)
    if what == "file":
        return Source("files", name, (path,))
    if what == "other" or name == "-":
        raise ValueError(f"--source {shown(name)}: a pipe, socket or device, which is no file; write a file first")
    if what == "folder":
        files = tuple(files_below(path, notes))
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return Source("saved", name, files)
        if reading.of_data_sets:
            return Source("loaded", name, files)
        if not files:
            raise ValueError(f"--source {shown(name)}: {'; '.join(['the folder has no files', *notes])}")
        return Source("files", name, files)
    if any(sign in name for sign in _WILDCARDS):
        left_out = _LeftOut()
        files = tuple(_once(sorted(_matches(path, left_out), key=_sort_key), {}))
        notes += left_out.notes()
        if not files:
            raise ValueError(f"--source {shown(name)}: {'; '.join(['no file matches', *left_out.notes()])}")
        return Source("files", name, files)
    file_like = re.search(r"\.(txt|md|py|jsonl?|ndjson|csv|tsv|parquet|arrow|gz|zst|bz2|xz)$", name)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith(".") and not file_like:
        return Source("loaded", name)
    if path.is_symlink():
        raise ValueError(f"--source {shown(name)}: a link that leads nowhere")
    raise ValueError(f"--source {shown(name)}: no such file or folder (data sets of the hub are named OWNER/NAME)")


def _what(
    path: Path | os.DirEntry[str],
) -> tuple[Literal["file", "folder", "other", "nowhere"], os.stat_result | None]:
    """What a path leads to, through links. Raises ValueError when that can't be told."""
    try:
        status = path.stat()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG):
            return "nowhere", None
        raise ValueError(f"{shown(Path(path))}: {_unreadable(error)}") from None
    if stat.S_ISREG(status.st_mode):
        return "file", status
    return ("folder" if stat.S_ISDIR(status.st_mode) else "other"), status


def _unreadable(error: OSError) -> str:
    return f"cannot be read ({error.strerror}); change its rights, or leave it out"


@dataclass
class _LeftOut:
    """What was found and is not read: links that lead nowhere, and what is no file."""

    nowhere: list[Path] = field(default_factory=list)
    other: list[Path] = field(default_factory=list)

    def notes(self) -> list[str]:
        kinds = (("link(s) lead nowhere", self.nowhere), ("pipes, sockets or devices are no files", self.other))
        return [
            f"{len(paths)} {what} and are left out, such as {shown(min(paths, key=_sort_key))}"
            for what, paths in kinds
            if paths
        ]


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
    left_out = _LeftOut()
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
                else:
                    add(place / entry.name, *_what(entry))

    def add(path: Path, what: str, status: os.stat_result | None) -> None:
        if what == "file" and status and (status.st_dev, status.st_ino) not in seen_files:
            seen_files.add((status.st_dev, status.st_ino))
            files.append(path)
        elif what == "other":
            left_out.other.append(path)
        elif what == "nowhere" and path.is_symlink():
            left_out.nowhere.append(path)

    visit(folder)
    while links:  # after everything that has a path of its own; a linked folder may hold more links
        batch, links = sorted(links, key=_sort_key), []
        for link in batch:
            what, status = _what(link)
            if what == "folder":
                visit(link)
            else:
                add(link, what, status)
    notes += left_out.notes()
    return sorted(files, key=_sort_key)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: os.fsencode(entry.name))
    except OSError as error:
        raise ValueError(f"{shown(folder)}: {_unreadable(error)}") from None


def _sort_key(path: Path) -> tuple[str, ...]:
    return path.parts


def _matches(pattern: Path, left_out: _LeftOut) -> Iterator[Path]:
    """The files that a glob matches, through links too; a linked folder is not entered from inside itself.

    `glob.glob` of Python 3.11 enters it until the system refuses, 40 levels deep.
    """
    # Each "**" behind another would look through the whole tree once more, for the same files.
    parts = tuple(
        part
        for part, before in zip(pattern.parts, ("", *pattern.parts), strict=False)
        if part != "**" or before != "**"
    )
    start = Path(parts[0]) if pattern.is_absolute() else Path()
    for path in _expand(start, parts[1:] if pattern.is_absolute() else parts, ()):
        what, _ = _what(path)
        if what == "file":
            yield path
        elif what == "other":
            left_out.other.append(path)
        elif path.is_symlink():
            left_out.nowhere.append(path)


def _expand(folder: Path, parts: tuple[str, ...], inside: tuple[_FileId, ...]) -> Iterator[Path]:
    """What the pattern matches and is no folder."""
    first, rest = parts[0], parts[1:]
    if first != "**" and not any(sign in first for sign in _WILDCARDS):
        path = folder / first
        is_folder = _what(path)[0] == "folder"
        if rest and is_folder:
            yield from _expand(path, rest, ())
        elif not rest and not is_folder and os.path.lexists(path):
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
        # Of a link the system is asked, which may refuse; of the others the folder says it.
        is_folder = _what(entry)[0] == "folder" if entry.is_symlink() else entry.is_dir()
        if first == "**":
            if is_folder:
                yield from _expand(path, parts, (*inside, identity))
            elif not rest:
                yield path
        elif fnmatchcase(entry.name, first):
            if rest and is_folder:
                yield from _expand(path, rest, ())
            elif not rest and not is_folder:
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
