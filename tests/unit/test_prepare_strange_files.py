"""Shows that prepare reads files for what they are, or says so, and that links and names neither lose nor double."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from gptb_ds.cli import main
from gptb_ds.data.documents import open_store
from tests.harness.stores import fail, prepare, texts_of


def stored(tmp_path: Path, *arguments: object) -> list[str]:
    """The texts of a store made with these arguments."""
    out = tmp_path / "store"
    shutil.rmtree(out, ignore_errors=True)
    prepare("--source", *arguments, "--holdout", 0, "--out", out)
    return texts_of(out)


# Links


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """A folder with links: to a folder outside, upward, to each other, to a file that is there already, to nowhere."""
    outside, folder = tmp_path / "outside", tmp_path / "corpus"
    (outside / "deep").mkdir(parents=True)
    (outside / "deep/far.txt").write_text("far")
    (folder / "a").mkdir(parents=True)
    (folder / "a/near.txt").write_text("near")
    (folder / "elsewhere").symlink_to(outside)
    (folder / "a/up").symlink_to(folder)
    (outside / "back").symlink_to(folder)
    (folder / "again.txt").symlink_to(folder / "a/near.txt")
    (folder / "lost.txt").symlink_to(tmp_path / "nowhere")
    return folder


def test_links_are_followed_and_every_file_is_read_once(
    linked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert stored(tmp_path, linked) == ["far", "near"]
    assert f"1 link(s) lead nowhere and are left out, such as {linked}/lost.txt" in capsys.readouterr().out
    for pattern in ("**/*.txt", "**", "*/*.txt", "elsewhere/**/*.txt", "elsewhere/back/a/*.txt"):
        expected = {"*/*.txt": ["near"], "elsewhere/**/*.txt": ["far", "near"], "elsewhere/back/a/*.txt": ["near"]}
        assert stored(tmp_path, linked / pattern) == expected.get(pattern, ["far", "near"])


def test_a_file_that_is_named_twice_is_read_once_and_said(
    linked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    near = linked / "a/near.txt"
    assert stored(tmp_path, near, linked, near, linked / "a/*.txt") == ["far", "near"]
    assert f"were named before and are read once, such as {near}" in capsys.readouterr().out


def test_a_file_name_that_is_not_unicode_is_read_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = os.fsencode(tmp_path / "names")
    os.mkdir(folder)
    for name, text in ((b"caf\xe9.txt", b"coffee"), (b"b.txt", b"b"), (b"bad\xff.txt", b"\xff")):
        with open(folder + b"/" + name, "wb") as file:
            file.write(text)
    line = fail("--source", tmp_path / "names", "--out", tmp_path / "no")
    assert "bad\\xff.txt: not UTF-8 at byte 0" in line
    assert stored(tmp_path, tmp_path / "names", "--on-error", "skip") == ["b", "coffee"]
    assert "left out: 1 records with errors" in capsys.readouterr().out
    named = os.fsdecode(folder + b"/caf\xe9.txt")
    assert stored(tmp_path, named, named) == ["coffee"]
    assert "caf\\xe9.txt" in capsys.readouterr().out


def test_links_in_a_circle_and_what_is_no_file_are_left_out_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    (folder / "a.txt").write_text("one")
    for name, target in (
        ("self.txt", "self.txt"),
        ("to.txt", "fro.txt"),
        ("fro.txt", "to.txt"),
        ("zero.txt", "/dev/zero"),
    ):
        (folder / name).symlink_to(target)
    os.mkfifo(folder / "pipe.txt")
    for source in (folder, folder / "*.txt", folder / "**"):
        assert stored(tmp_path, source) == ["one"]
        said = capsys.readouterr().out
        assert f"3 link(s) lead nowhere and are left out, such as {folder}/fro.txt" in said
        assert f"2 pipes, sockets or devices are no files and are left out, such as {folder}/pipe.txt" in said
    refused = {
        folder / "pipe.txt": "a pipe, socket or device",
        folder / "zero.txt": "a pipe, socket or device",
        "-": "a pipe, socket or device",
        folder / "self.txt": "a link that leads nowhere",
        folder / "[s-t]*.txt": "no file matches; 2 link(s) lead nowhere",
        "": "is empty (a variable that is not set?)",
    }
    for source, words in refused.items():
        assert words in fail("--source", source, "--out", tmp_path / "no")


def test_a_name_that_would_move_the_cursor_is_shown_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "a\n\x1b[2Jb.txt").write_bytes(b"\xff")
    assert "a\\n\\x1b[2Jb.txt: not UTF-8" in fail("--source", tmp_path / "a\n\x1b[2Jb.txt", "--out", tmp_path / "no")


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "texts/closed").mkdir(parents=True)
    (tmp_path / "texts/a.txt").write_text("a")
    scandir = os.scandir

    def refuse(path: Path) -> object:  # root, who runs some tests, may read everything
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert "closed: cannot be read (Permission denied)" in fail("--source", tmp_path / "texts", "--out", tmp_path / "s")


# Packed files and files that are no text


def tar(packing: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        with tarfile.open(path, f"w:{packing}") as archive:
            info = tarfile.TarInfo("books/a.txt")
            info.size = 3
            archive.addfile(info, io.BytesIO(b"one"))

    return make


def old_tar(path: Path) -> None:
    info = tarfile.TarInfo("a.txt")
    info.size = 3
    header = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    header[257:265] = bytes(8)  # as before there was a magic
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header[:512])
    path.write_bytes(bytes(header) + b"one".ljust(512, b"\0") + bytes(1024))


def zip_archive(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "one")


def starts_with(start: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(start + b"some text and more of it, far from anything") and None


REFUSED = [
    (tar(""), "a tar archive: unpack it first"),
    (tar("gz"), "a compressed tar archive: unpack it first"),
    (tar("bz2"), "a compressed tar archive: unpack it first"),
    (tar("xz"), "a compressed tar archive: unpack it first"),
    (old_tar, "a tar archive: unpack it first"),
    (zip_archive, "a zip archive or office document: unpack it first"),
    (starts_with(b"7z\xbc\xaf\x27\x1c"), "a 7z archive: unpack it first"),
    (starts_with(b"Rar!\x1a\x07\x01\x00"), "a rar archive: unpack it first"),
    (starts_with(b"\x04\x22\x4d\x18"), "lz4-compressed: unpack it first"),
    (starts_with(b"%PDF-1.7\n"), "a PDF document: convert it to text first"),
    (starts_with(b"SQLite format 3\x00"), "an SQLite database: export its text first"),
    (starts_with(b"WARC/1.0\r\nWARC-Type: warcinfo\r\n"), "a WARC archive of web pages: extract its texts first"),
    (starts_with(b'<mediawiki version="0.10">'), "a dump of a wiki: extract its texts first"),
    (starts_with(b"version https://git-lfs.github.com/spec/v1\n"), "a pointer of Git LFS, not the file itself"),
    (lambda path: path.write_bytes("wide text".encode("utf-16")), "UTF-16 text: convert it first"),
    (lambda path: path.write_bytes(("wide text " * 9).encode("utf-16-le")), "not text (every tenth byte is 0)"),
    (lambda path: path.write_bytes(gzip.compress(gzip.compress(b"one"))), "packed twice"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED, ids=[message for _, message in REFUSED])
@pytest.mark.parametrize("name", ["a.txt", "a", "books.dat"])
def test_what_is_no_text_is_said_or_left_out(
    make: Callable[[Path], None], message: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "texts").mkdir()
    make(tmp_path / "texts" / name)
    (tmp_path / "texts/good.txt").write_text("good")
    assert f"{name}: {message}" in fail("--source", tmp_path / "texts", "--out", tmp_path / "no")
    assert stored(tmp_path, tmp_path / "texts", "--on-error", "skip") == ["good"]
    assert f"{name}: {message}" in capsys.readouterr().out


def zstd_long(content: bytes) -> bytes:
    """As `zstd --long=28` packs a stream: a window that a reader has to be told to accept."""
    parameters = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return packer.compress(content) + packer.flush()


def pieces(pack: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    return lambda content: pack(content[:9]) + pack(content[9:])


PACKED = {
    "gzip": gzip.compress,
    "gzip of several members": pieces(gzip.compress),
    "bzip2": bz2.compress,
    "bzip2 of several streams": pieces(bz2.compress),
    "xz": lzma.compress,
    "xz of several streams": pieces(lzma.compress),
    "zstd": zstandard.ZstdCompressor().compress,
    "zstd of several frames": pieces(zstandard.ZstdCompressor().compress),
    "zstd --long=28": zstd_long,
    "zstd behind a skipped frame": lambda c: b"\x50\x2a\x4d\x18\x04\0\0\0abcd" + zstandard.ZstdCompressor().compress(c),
}


@pytest.mark.parametrize("packed", PACKED.values(), ids=PACKED)
def test_packed_text_is_read_whatever_it_is_called(packed: Callable[[bytes], bytes], tmp_path: Path) -> None:
    lines = b"".join(json.dumps({"text": f"line {n}"}).encode() + b"\n" for n in range(9))
    (tmp_path / "a.jsonl").write_bytes(packed(lines))
    assert stored(tmp_path, tmp_path / "a.jsonl") == [f"line {n}" for n in range(9)]
    (tmp_path / "plain").write_bytes(packed("schön, nicht?".encode()))
    assert stored(tmp_path, tmp_path / "plain") == ["schön, nicht?"]


@pytest.mark.parametrize(
    ("name", "packed"), [("A.NDJSON.GZ", gzip.compress), ("A.JSONL.ZST", PACKED["zstd"]), ("a.JSON.bz2", bz2.compress)]
)
def test_endings_in_capitals_and_one_behind_another(
    name: str, packed: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(packed(b'{"text": "one"}\n{"text": "two"}\n'))
    assert stored(tmp_path, tmp_path / name) == ["one", "two"]


# What is taken as what


def test_what_was_taken_as_what_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "dataset"
    folder.mkdir()
    records = b'{"text": "one"}\n{"text": "two"}\n'
    for name in ("part-00000", "train.jsonl", "train.00001"):
        (folder / name).write_bytes(records)
    (folder / "README.md").write_text("# A data set")
    (folder / "notes.txt").write_bytes(records)
    (folder / "table.csv").write_text('text\n"over\nlines"\n')
    stored(tmp_path, folder)
    said = capsys.readouterr().out
    assert "2 files as text" in said and "3 files as JSON records" in said and "1 file as tables" in said
    assert f"1 files beside the records, such as {folder}/README.md, were read as text" in said
    assert f"1 text files, such as {folder}/notes.txt, hold JSON lines and were read as text" in said
    assert "1 rows of tables hold values that span lines" in said
    assert "bytes of 0" not in said
    prepare("--describe", tmp_path / "store")
    assert "3 files as JSON records" in capsys.readouterr().out


@pytest.mark.parametrize("content", ['[{"text": "one"},\n {"text": "two"}]', '{\n"text": ["one", "two"]\n}'])
def test_json_of_every_shape_is_known_without_an_ending(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("part-00000", "notes.txt"):
        (tmp_path / name).write_text(content)
    assert stored(tmp_path, tmp_path / "part-00000") == ["one", "two"]
    assert stored(tmp_path, tmp_path / "notes.txt") == [content]
    assert "notes.txt, hold JSON lines and were read as text" in capsys.readouterr().out
    (tmp_path / "prose").write_text('{"a": 1} is JSON, [this] is not')
    assert stored(tmp_path, tmp_path / "prose") == ['{"a": 1} is JSON, [this] is not']


@pytest.mark.parametrize("options", [(), ("--separator", "\\n")])
def test_text_with_bytes_of_0_is_said(
    options: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("one two three four five\0 six\n" * 9)
    stored(tmp_path, tmp_path / "a.txt", *options)
    assert f"1 text files, such as {tmp_path}/a.txt, hold bytes of 0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("separator", "text", "expected"),
    [
        ("\\n\\n", "a\n\nb\n\nc", ["a", "b", "c"]),
        ("\n\n", "a\r\n\r\nb\r\n\r\nc", ["a", "b", "c"]),
        ("\\n\\n", "a\r\n\r\nb\n\nc", ["a", "b", "c"]),
        ("\\t", "a\tb", ["a", "b"]),
        ("\\\\n", "a\\nb", ["a", "b"]),
        (".", "a.b", ["a", "b"]),
        ("<|end|>\n", "a<|end|>\r\nb", ["a", "b"]),
    ],
)
def test_separators_are_read_as_they_are_meant(
    separator: str, text: str, expected: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert stored(tmp_path, tmp_path / "a.txt", "--separator", separator) == expected
    assert "occurs nowhere" not in capsys.readouterr().out


def test_a_separator_that_occurs_nowhere_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, text in (("a", "one===two"), ("b", "three"), ("c", "four")):
        (tmp_path / f"{name}.txt").write_text(text)
    stored(tmp_path, *(tmp_path / f"{name}.txt" for name in "abc"), "--separator", "===")
    said = capsys.readouterr().out
    assert f"the separator '===' occurs nowhere in 2 of 3 text files, such as {tmp_path}/b.txt" in said


@pytest.mark.parametrize(
    "content",
    [
        json.dumps([{"text": "one"}, {"text": "two"}], indent=2),
        json.dumps({"version": 1, "data": [{"text": "one"}, {"text": "two"}]}),
        json.dumps({"version": 1, "data": [{"text": "one"}, {"text": "two"}]}, indent=2),
        json.dumps({"text": ["one", "two"], "id": [1, 2]}),
        json.dumps({"text": "one"}, indent=2) + "\n" + json.dumps({"text": "two"}, indent=2),
        '\n\n{"text": "one"}\n\n{"text": "two"}',
        '\ufeff{"text": "one"}\r\n{"text": "two"}\r\n',
    ],
)
def test_every_shape_of_json(content: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(content, newline="")
    assert stored(tmp_path, tmp_path / "a.json") == ["one", "two"]


def test_a_single_object_is_one_record(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"text": "one", "parts": [{"text": "not this"}]}, indent=1))
    assert stored(tmp_path, tmp_path / "a.json") == ["one"]
    (tmp_path / "a.json").write_text('{"texte": "one"}')
    assert "a.json (record 1): no field 'text' (it has texte)" in fail(
        "--source", tmp_path / "a.json", "--out", tmp_path / "s"
    )


def test_a_key_that_is_not_unicode_costs_its_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"t\\ud83d": "cut"}\n{"text": "fine too"}\n')
    assert "a.jsonl:2: no field 'text' (it has t\\ud83d)" in fail(
        "--source", tmp_path / "a.jsonl", "--out", tmp_path / "s"
    )
    assert stored(tmp_path, tmp_path / "a.jsonl", "--on-error", "skip") == ["fine", "fine too"]
    assert "left out: 1 records with errors" in capsys.readouterr().out
    (tmp_path / "b.csv").write_bytes(b"id\xff,body\n1,x\n")
    assert "b.csv:2: no field 'text' (it has id\\udcff, body)" in fail(
        "--source", tmp_path / "b.csv", "--out", tmp_path / "s"
    )


# Columns


def write_parquet(path: Path, **columns: list) -> None:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def test_parquet_files_may_differ_in_what_nobody_needs(tmp_path: Path) -> None:
    write_parquet(tmp_path / "0.parquet", text=["one"], score=[1.0])
    write_parquet(tmp_path / "1.parquet", text=["two"], score=["high"])
    write_parquet(tmp_path / "2.parquet", text=pyarrow.array([], pyarrow.string()))
    write_parquet(tmp_path / "3.parquet", lang=["en"], text=["three"])
    assert stored(tmp_path, tmp_path / "*.parquet") == ["one", "three", "two"]
    assert "the corpus is empty" in fail("--source", tmp_path / "2.parquet", "--out", tmp_path / "s")
    write_parquet(tmp_path / "4.parquet", body=["four"])
    assert "4.parquet: no field 'text'; its fields are body" in fail(
        "--source", tmp_path / "*.parquet", "--out", tmp_path / "s"
    )


def test_columns_are_known_by_their_content(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.bin", text=["one"])
    assert stored(tmp_path, tmp_path / "a.bin") == ["one"]
    table = pyarrow.table({"text": ["two"]})
    with pyarrow.ipc.new_stream(str(tmp_path / "b.bin"), table.schema) as stream:
        stream.write_table(table)
    assert stored(tmp_path, tmp_path / "b.bin") == ["two"]
    (tmp_path / "a.parquet").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "a.parquet: cannot be read (it does not begin" in fail(
        "--source", tmp_path / "a.parquet", "--out", tmp_path / "s"
    )


def test_a_field_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    """Which of them is meant nobody can tell; the libraries take the last without a word."""
    twice = pyarrow.table([pyarrow.array(["one"]), pyarrow.array(["two"])], names=["text", "text"])
    pyarrow.parquet.write_table(twice, tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text("text,text\none,two\n")
    (tmp_path / "a.jsonl").write_text('{"text": "one", "text": "two"}\n')
    for name, words in (
        ("a.parquet", "a.parquet: 2 fields are called 'text'"),
        ("a.csv", "a.csv:1: 2 fields are called 'text'"),
        ("a.jsonl", "a.jsonl:1: the field 'text' is there more than once"),
    ):
        assert words in fail("--source", tmp_path / name, "--out", tmp_path / "s")
    (tmp_path / "b.jsonl").write_text('{"text": "one \\"text\\"", "more": {"text": "two"}}\n')
    (tmp_path / "b.csv").write_text("id,text,id\n1,two,3\n")
    assert stored(tmp_path, tmp_path / "b.*") == ['one "text"', "two"]


def test_the_split_of_a_folder_may_have_columns_that_differ(tmp_path: Path) -> None:
    folder = tmp_path / "dataset"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"text":"one","n":1}\n{"text":"two","n":2}\n')
    (folder / "b.jsonl").write_text('{"text":"three","lang":"en"}\n')
    assert stored(tmp_path, folder, "--split", "train") == ["one", "three", "two"]
    assert "no split 'test'; choose --split out of train" in fail(
        "--source", folder, "--split", "test", "--out", tmp_path / "s"
    )


# Tables


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", 'id;text\n1;one, two\n2;"a; b"\n'),
        ("a.csv", "id\ttext\n1\tone, two\n2\ta; b\n"),
        ("a.csv", "id|text\n1|one, two\n2|a; b\n"),
        ("a.tsv", "id\ttext\n1\tone, two\n2\ta; b\n"),
        ("a.csv", '\ufeffid,text\r\n1,"one, two"\r\n2,a; b\r\n'),
        ("a.csv", 'id,text\r1,"one, two"\r2,a; b\r'),
        ("a.CSV", 'text,id\n"one, two",1\n\n"a; b",2'),
        ("a.csv", '"text"\n"one, two"\n"a; b"\n'),
        ("a.csv", 'sep=;\r\nid;text\r\n1;one, two\r\n2;"a; b"\r\n'),
        ("a.psv", "id|text\n1|one, two\n2|a; b\n"),
    ],
)
def test_dialects_of_tables(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content, newline="")
    assert stored(tmp_path, tmp_path / name) == ["a; b", "one, two"]


def test_quotation_marks_inside_values(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('id,text\n1,"say ""hi"", twice"\n2,5" pipe\n3,"over\nlines"\n')
    assert stored(tmp_path, tmp_path / "a.csv") == ['5" pipe', "over\nlines", 'say "hi", twice']
    (tmp_path / "a.csv").write_text('id,text\n1,"say \\"hi\\", twice"\n2,"C:\\new\\n"\n3,"a \\\\"\n')
    assert stored(tmp_path, tmp_path / "a.csv") == ["C:\\new\\n", "a \\", 'say "hi", twice']


def test_quotation_marks_between_tabs_may_mean_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text('id\ttext\n1\t"so" it begins\n2\t"\n3\tplain\n')
    assert stored(tmp_path, tmp_path / "a.tsv") == ['"', '"so" it begins', "plain"]
    (tmp_path / "a.tsv").write_text('id\ttext\n1\t"so" it begins\n2\t"\n' + '3\t"two\nlines, a\ttab"\n' * 5)
    assert "a.tsv:2: a quotation mark" in fail("--source", tmp_path / "a.tsv", "--out", tmp_path / "s")


@pytest.mark.parametrize(
    "bad",
    [
        '2,"never closed',
        '2,"closed" in the midst',
        '2,"closed later\n9,by a row"',  # both lines are rows: numbers come first
        "2,too,many",
    ],
)
def test_a_stray_mark_costs_its_row_alone(bad: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = [f'{n},"row {n}"' for n in range(3, 40)]
    (tmp_path / "a.csv").write_text("\n".join(["id,text", "1,first", bad, *good]) + "\n")
    assert "a.csv:3: " in fail("--source", tmp_path / "a.csv", "--out", tmp_path / "s")
    texts = stored(tmp_path, tmp_path / "a.csv", "--on-error", "skip")
    assert set(texts) >= {"first", *(f"row {n}" for n in range(3, 40))}
    assert "left out: 1 records with errors" in capsys.readouterr().out


def test_a_stray_mark_in_the_first_row_takes_none_along(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('id,text\n1,"open\n2,two\n3,three"\n4,four\n')
    assert "a.csv:2: a quotation mark" in fail("--source", tmp_path / "a.csv", "--out", tmp_path / "s")
    assert stored(tmp_path, tmp_path / "a.csv", "--on-error", "skip") == ["four", 'three"', "two"]


def test_lines_that_may_be_rows_are_said_where_nothing_tells(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.csv").write_text('name,text\nann,one\nbob,"open\ncid,two\ndan,three"\neve,"a poem\nof lines"\n')
    assert stored(tmp_path, tmp_path / "a.csv") == ["a poem\nof lines", "one", "open\ncid,two\ndan,three"]
    said = capsys.readouterr().out
    assert f"warning: 1 rows of tables, such as {tmp_path}/a.csv:3, span lines that look like rows" in said


def test_values_over_lines_that_look_a_little_like_rows(tmp_path: Path) -> None:
    poem = "roses are red\nviolets, blue\n\n1 more line"
    (tmp_path / "a.csv").write_text(f'id,text\n1,one\n2,"{poem}"\n')
    assert stored(tmp_path, tmp_path / "a.csv") == ["one", poem]


def test_a_row_that_lost_its_end_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,text,lang\n1,one,en\n2,broken\nin two,en\n")
    assert "a.csv:3: 2 values for 3 columns" in fail("--source", tmp_path / "a.csv", "--out", tmp_path / "s")


# Tokenizers


def test_tokenizers_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text " * 50)
    prepare("--source", tmp_path / "a.txt", "--tokenizer", "bpe:270", "--out", tmp_path / "bpe")
    newer = tmp_path / "newer"
    shutil.copytree(tmp_path / "bpe/tokenizer", newer)
    file = json.loads((newer / "tokenizer.json").read_text())
    file["model"]["type"] = "BPE-2"
    file["model"]["merges"] = {"packed": []}
    (newer / "tokenizer.json").write_text(json.dumps(file))
    line = fail("--source", tmp_path / "a.txt", "--tokenizer", newer, "--out", tmp_path / "s")
    assert f"--tokenizer {newer}/tokenizer.json: cannot be read by tokenizers" in line
    assert "made by a newer version, or damaged" in line and "pip install -U" in line


def test_a_models_folder_without_a_tokenizer_is_said_so(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=8, n_layer=1, n_head=1, n_positions=8))
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "a.txt").write_text("some text")
    line = fail("--source", tmp_path / "a.txt", "--tokenizer", tmp_path / "model", "--out", tmp_path / "s")
    assert "model has no tokenizer files" in line and "the corpus is empty" not in line


# Nothing to learn, no room


def test_a_corpus_in_which_nothing_counts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"input_ids": [5, 6], "labels": [-100, -100]}\n')
    assert "no target counts in the loss" in fail(
        "--source", tmp_path / "a.jsonl", "--labels-field", "labels", "--holdout", 0, "--out", tmp_path / "s"
    )


def test_a_mask_has_ones_and_zeros(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"input_ids": [5, 6], "loss_mask": [2, 0]}\n')
    assert "a.jsonl (record 1): 'loss_mask' has other numbers than 0 and 1" in fail(
        "--source", tmp_path / "a.jsonl", "--loss-mask-field", "loss_mask", "--out", tmp_path / "s"
    )


def test_a_full_disk_is_said_of_the_store(tmp_path: Path) -> None:
    """In a process of its own: the system refuses to write more than so many bytes into a file."""
    (tmp_path / "a.txt").write_text(" ".join(map(str, range(100_000))))
    program = (
        "import resource, signal, sys\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "from gptb_ds.cli import main\nsys.exit(main(sys.argv[1:]))"
    )
    for tokenizer in ("bytes", "bpe:300"):
        arguments = ["prepare", "--source", str(tmp_path / "a.txt"), "--tokenizer", tokenizer, "--out"]
        done = subprocess.run(
            ["python", "-c", program, *arguments, str(tmp_path / "store")], capture_output=True, text=True
        )
        assert done.returncode != 0
        assert done.stderr.count("\n") == 1
        assert f"{tmp_path}/store: File too large while the store was written; nothing of it" in done.stderr
        assert sorted(p.name for p in tmp_path.iterdir()) == [".store.lock", "a.txt"]


def test_a_disk_that_is_too_small_is_noticed_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("text " * 100_000)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=900_000))
    line = fail("--source", tmp_path / "a.txt", "--out", tmp_path / "store")
    assert "the store needs about 0.0 GB and its disk has 0.0 GB left" in line
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_100_000))
    assert prepare("--source", tmp_path / "a.txt", "--out", tmp_path / "store") == 0


def test_held_out_documents_of_few_are_moved_with_their_loss_weights(tmp_path: Path) -> None:
    """None of three documents falls below the share, so the lowest is moved to the other split afterwards."""
    records = [{"input_ids": [5 + n, 6, 7][: n + 1], "labels": [-100, 6, 7][: n + 1]} for n in range(3)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    arguments = ("--source", tmp_path / "a.jsonl", "--labels-field", "labels", "--out")
    prepare(*arguments, tmp_path / "all", "--holdout", 0)
    prepare(*arguments, tmp_path / "one", "--holdout", 1e-12)
    prepare(*arguments, tmp_path / "most", "--holdout", 1 - 1e-12)

    def documents(name: str) -> list[tuple]:
        found = []
        for split in ("train", "validation"):
            try:
                store = open_store(tmp_path / name, split)
            except ValueError:
                continue
            assert store.counted is not None
            for i, start in enumerate(store.offsets[:-1].tolist()):
                end = int(store.offsets[i + 1])
                found.append((store.document(i).tolist(), store.counted[start + 1 : end + 1].tolist()))
        return sorted(found)

    assert documents("one") == documents("most") == documents("all")
    counts = [
        [open_store(tmp_path / name, split).num_documents for split in ("train", "validation")]
        for name in ("one", "most")
    ]
    assert counts == [[2, 1], [1, 2]]
    sizes = [sum(open_store(tmp_path / "one", split).num_bytes for split in ("train", "validation"))]
    assert sizes == [open_store(tmp_path / "all").num_bytes]


def test_the_store_may_not_lie_among_what_a_glob_reads(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    out = tmp_path / "out"
    assert main(["prepare", "--source", str(tmp_path / "**"), "--out", str(out)]) == 0
    assert "has files that --source names, such as" in fail("--source", tmp_path / "**", "--out", out, "--overwrite")
