"""Shows that no part of a source is lost or doubled without a word: cut-off members, repeated headers and keys."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gptb_ds.cli import main
from tests.harness.stores import fail, prepare, texts_of

LINES = b"".join(json.dumps({"text": os.urandom(30).hex()}).encode() + b"\n" for _ in range(3_000))
PACKINGS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": lambda content: bz2.compress(content, compresslevel=1),  # blocks of 100 kB
    "xz": lzma.compress,
    "zst": zstandard.ZstdCompressor().compress,
}


def stored(out: Path, *arguments: object) -> list[str]:
    prepare("--source", *arguments, "--holdout", 0, "--out", out)
    return texts_of(out)


@pytest.mark.parametrize("ending", PACKINGS)
def test_a_packed_file_that_is_cut_off_is_said(ending: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / f"a.jsonl.{ending}"
    packed = PACKINGS[ending](LINES)
    file.write_bytes(packed[: len(packed) * 2 // 3])
    assert f"{file}" in (line := fail("--source", file, "--out", tmp_path / "no")) and "cannot be read (" in line
    texts = stored(tmp_path / "store", file, "--on-error", "skip")
    assert 0 < len(texts) < 3_000
    assert "what follows, to the end of the file, cannot be read" in capsys.readouterr().out


@pytest.mark.parametrize("ending", PACKINGS)
def test_what_follows_a_packed_members_end_is_read_or_said(ending: str, tmp_path: Path) -> None:
    pack = PACKINGS[ending]
    file = tmp_path / f"a.txt.{ending}"
    file.write_bytes(pack(b"one") + bytes(0 if ending == "gz" else 4) + pack(b" two") + bytes(8))
    assert stored(tmp_path / "padded", file) == ["one two"]
    file.write_bytes(pack(b"one") + b"something else")
    assert "cannot be read (" in fail("--source", file, "--out", tmp_path / "no")


def test_the_packing_is_told_by_content_not_by_name(tmp_path: Path) -> None:
    for number, (ending, other) in enumerate(zip(PACKINGS, ["xz", "zst", "gz", "bz2"], strict=True)):
        (tmp_path / f"a.txt.{other}").write_bytes(PACKINGS[ending](b"fine"))
        assert stored(tmp_path / f"{number}", tmp_path / f"a.txt.{other}") == ["fine"]
    (tmp_path / "a.txt.gz").write_bytes(b"not compressed")
    line = fail("--source", tmp_path / "a.txt.gz", "--out", tmp_path / "no")
    assert "holds no gzip data; where it is not compressed, take .gz off its name" in line


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le"])
def test_a_short_text_of_wide_characters_is_no_text(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("hello".encode(encoding))
    assert "not text (every tenth byte is 0)" in fail("--source", tmp_path / "a.txt", "--out", tmp_path / "no")


@pytest.mark.parametrize(
    "content",
    [
        '{\n"text": "one",\n"text": "two"\n}',
        '[{"text": "one", "text": "two"}]',
        '{"data": [{"text": "one", "text": "two"}]}',
        '{"text": ["one"], "text": ["two"]}',
        '{"text": "one", "text": "two"}\n{"text": "three"}\n',
    ],
)
def test_a_field_twice_is_refused_in_every_shape_of_json(content: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(content)
    assert "the field 'text' is there more than once" in fail("--source", tmp_path / "a.json", "--out", tmp_path / "no")


def test_a_header_that_comes_again_is_no_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.csv").write_text("id,text\n1,one\nid,text\n2,two\n")
    assert stored(tmp_path / "store", tmp_path / "a.csv") == ["one", "two"]
    assert (
        f"1 rows of tables, such as {tmp_path}/a.csv:3, repeat the header and are left out" in capsys.readouterr().out
    )


def test_what_is_counted_is_counted_once_when_a_tokenizer_reads_the_records_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.csv").write_text('id,text\n1,one\nid,text\n2,"t\nwo"\n')
    stored(tmp_path / "store", tmp_path / "a.csv", "--tokenizer", "bpe:260")
    said = capsys.readouterr().out
    assert "1 rows of tables, such as" in said and "1 rows of tables hold values that span lines" in said


def test_a_row_of_parquet_that_is_not_utf8_costs_itself_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    column = pyarrow.array([b"one", b"tw\xffo", b"three"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": column, "id": [1, 2, 3]}), tmp_path / "a.parquet")
    line = fail("--source", tmp_path / "a.parquet", "--out", tmp_path / "no")
    assert "a.parquet row 1: the field 'text' is not UTF-8 at character 2" in line
    assert stored(tmp_path / "store", tmp_path / "a.parquet", "--on-error", "skip") == ["one", "three"]
    assert "left out: 1 records with errors" in capsys.readouterr().out


def test_many_fields_are_named_in_part(tmp_path: Path) -> None:
    names = [f"column{n}" for n in range(3_000)]
    (tmp_path / "a.csv").write_text(",".join(names) + "\n" + ",".join("1" * 3_000) + "\n")
    pyarrow.parquet.write_table(pyarrow.table({name: [1] for name in names}), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text(json.dumps(dict.fromkeys(names, 1)) + "\n")
    for ending in ("csv", "parquet", "jsonl"):
        line = fail("--source", tmp_path / f"a.{ending}", "--out", tmp_path / "no")
        assert "no field 'text'" in line and "column19 and 2,980 more" in line


# Names, splits and tokenizers that are not what they were taken for


def test_the_split_of_a_single_saved_data_set_is_not_passed_over(tmp_path: Path) -> None:
    datasets.Dataset.from_list([{"text": "one"}]).save_to_disk(str(tmp_path / "saved"))
    assert stored(tmp_path / "store", tmp_path / "saved", "--split", "train") == ["one"]
    line = fail("--source", tmp_path / "saved", "--split", "test", "--out", tmp_path / "no")
    assert "has no split 'test', it is a single data set; leave --split out" in line
    arrow = next((tmp_path / "saved").glob("*.arrow"))
    arrow.unlink()
    assert str(arrow) in fail("--source", tmp_path / "saved", "--out", tmp_path / "no")


def test_a_tokenizer_that_fails_or_is_none_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text")
    words = Tokenizer(models.WordLevel({"some": 0, "<end>": 1, "a": 2, "the": 3, "1": 4}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>").save_pretrained(tmp_path / "words")
    none = Tokenizer(models.WordLevel({"some": 0, "<end>": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=none, eos_token="<end>").save_pretrained(tmp_path / "none")
    (tmp_path / "store").mkdir()
    (tmp_path / "store/store.json").write_text("{}")
    cases = {
        tmp_path / "words": f"--tokenizer {tmp_path}/words: fails on a text (WordLevel error: Missing [UNK]",
        tmp_path / "none": f"--tokenizer {tmp_path}/none: its tokenizer fails on plain text",
        tmp_path / "words/tokenizer.json": f"is a file; give the folder that it is in, {tmp_path}/words",
        tmp_path / "store": f"{tmp_path}/store/tokenizer: this folder of the store is missing",
        tmp_path / "nowhere": "no such folder",
        "": "is empty (a variable that is not set?)",
        "bpe:100000000000": "at most 1,048,576",
        "bpe:²": "must be a number",
    }
    for tokenizer, words_of_line in cases.items():
        line = fail("--source", tmp_path / "a.txt", "--tokenizer", tokenizer, "--out", tmp_path / "no")
        assert words_of_line in line


def test_a_dangling_link_as_the_stores_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text")
    (tmp_path / "out").symlink_to(tmp_path / "gone/away")
    line = fail("--source", tmp_path / "a.txt", "--out", tmp_path / "out")
    assert f"--out {tmp_path}/out: a link that leads nowhere" in line


def test_a_store_behind_a_link_is_written_where_the_link_leads(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    for text, options in (("one", ()), ("two", ("--overwrite",))):
        (tmp_path / "a.txt").write_text(text)
        assert stored(tmp_path / "link", tmp_path / "a.txt", *options) == [text]
        assert (tmp_path / "link").is_symlink() and (tmp_path / "real/store.json").is_file()


def test_options_that_would_read_the_wrong_fields_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    for options, words in (
        (("--prompt-field", "text"), "--prompt-field text: is the text's field as well"),
        (("--ids-field", ""), "--ids-field '': is empty"),
        (("--labels-field", ""), "--labels-field '': is empty"),
    ):
        assert words in fail("--source", tmp_path / "a.jsonl", *options, "--out", tmp_path / "no")
    assert stored(tmp_path / "many", tmp_path / "a.jsonl", "--num-proc", 100_000) == ["x"]


def test_a_task_that_no_disk_would_hold_is_refused(tmp_path: Path) -> None:
    line = fail("--source", "task:parity?count=99999999999999", "--out", tmp_path / "no")
    assert "documents need at least" in line and "lower count" in line
    line = fail("--source", "task:parity?length=5&length=6", "--out", tmp_path / "no")
    assert "length is given more than once" in line


def test_a_store_is_made_when_nobody_reads_what_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("one")
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe, monkeypatch.context() as patched:
        patched.setattr("sys.stdout", pipe)
        assert (
            main(["prepare", "--source", str(tmp_path / "a.txt"), "--holdout", "0", "--out", str(tmp_path / "s")]) == 0
        )
    assert texts_of(tmp_path / "s") == ["one"]


def test_stars_behind_stars_cost_no_more_than_one(tmp_path: Path) -> None:
    deep = tmp_path.joinpath("t", *["d"] * 150)
    deep.mkdir(parents=True)
    (deep / "a.txt").write_text("deep")
    (tmp_path / "t/b.txt").write_text("high")
    assert stored(tmp_path / "store", f"{tmp_path}/t/{'**/' * 30}*.txt") == ["deep", "high"]


def test_a_header_that_comes_again_does_not_hide_a_stray_quotation_mark(tmp_path: Path) -> None:
    """Numbers in the first column tell rows from lines of a value, behind the second header as before it."""
    rows = '1,one\n2,two\nid,text\n3,"three\n4,four\n5,five"\n6,six\n'
    for name, content in (("once.csv", rows.replace("id,text\n", "")), ("again.csv", rows)):
        (tmp_path / name).write_text("id,text\n" + content)
        line = fail("--source", tmp_path / name, "--out", tmp_path / "no")
        assert "a quotation mark that is not closed in its row" in line
