"""Shows every kind of source, with good records, and what is said of bad ones."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
import zstandard

from gptb_ds.data import readers
from gptb_ds.data.documents import open_store
from gptb_ds.data.readers import Records, read_parts
from gptb_ds.data.sources import Reading, Source, find_sources
from tests.harness.stores import fail, prepare, texts_of

RECORDS = [{"id": i, "text": text} for i, text in enumerate(["one", "NA", "1.0", "ä ö\nü", "null", 'six, "quoted"'])]
TEXTS = sorted(r["text"] for r in RECORDS)


def lines_of(records: list[dict]) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def as_csv(path: Path, records: list[dict], delimiter: str = ",") -> None:
    import csv

    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=["id", "text"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(records)


def make_jsonl(folder: Path) -> Path:
    (folder / "a.jsonl").write_bytes(lines_of(RECORDS[:2]) + b"\n" + lines_of(RECORDS[2:]).rstrip())
    return folder / "a.jsonl"


def make_jsonl_gz(folder: Path) -> Path:
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines_of(RECORDS)))
    return folder / "a.jsonl.gz"


def make_jsonl_zst(folder: Path) -> Path:
    pack = zstandard.ZstdCompressor().compress
    (folder / "a.jsonl.zst").write_bytes(pack(lines_of(RECORDS[:3])) + pack(lines_of(RECORDS[3:])))  # two frames
    return folder / "a.jsonl.zst"


def make_json_array(folder: Path) -> Path:
    (folder / "a.json").write_text(json.dumps(RECORDS, indent=1))
    return folder / "a.json"


def make_csv(folder: Path) -> Path:
    as_csv(folder / "a.csv", RECORDS)
    return folder / "a.csv"


def make_tsv_gz(folder: Path) -> Path:
    as_csv(folder / "a.tsv", RECORDS, "\t")
    (folder / "a.tsv.gz").write_bytes(gzip.compress((folder / "a.tsv").read_bytes()))
    return folder / "a.tsv.gz"


def make_parquet(folder: Path) -> Path:
    datasets.Dataset.from_list(RECORDS).to_parquet(str(folder / "a.parquet"))
    return folder / "a.parquet"


def make_saved(folder: Path) -> Path:
    datasets.Dataset.from_list(RECORDS).save_to_disk(str(folder / "saved"))
    return folder / "saved"


def make_saved_dict(folder: Path) -> Path:
    splits = {"train": datasets.Dataset.from_list(RECORDS), "test": datasets.Dataset.from_list(RECORDS[:1])}
    datasets.DatasetDict(splits).save_to_disk(str(folder / "saved"))
    return folder / "saved"


def make_arrow(folder: Path) -> Path:
    return next(make_saved(folder).glob("*.arrow"))


def make_folder(folder: Path) -> Path:
    """Kinds and depths mixed, with something hidden."""
    for name, content in {
        "mixed/.git/config.txt": b"hidden",
        "mixed/.hidden.txt": b"hidden",
        "mixed/deep/er/a.txt.gz": gzip.compress(b"one"),
        "mixed/deep/b.txt.zst": zstandard.ZstdCompressor().compress(b"NA"),
        "mixed/c.md": b"1.0",
        "mixed/noend": "ä ö\nü".encode(),
        "mixed/d.jsonl": lines_of(RECORDS[4:]),
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder / "mixed"


def make_glob(folder: Path) -> Path:
    make_folder(folder)
    (folder / "mixed/binary.bin").write_bytes(b"\xff")
    for number, record in enumerate(RECORDS):
        (folder / f"mixed/deep/{number}.text").write_text(record["text"])
    return folder / "**/*.text"


@pytest.mark.parametrize(
    "make",
    [
        make_jsonl,
        make_jsonl_gz,
        make_jsonl_zst,
        make_json_array,
        make_csv,
        make_tsv_gz,
        make_parquet,
        make_saved,
        make_saved_dict,
        make_arrow,
        make_folder,
        make_glob,
    ],
)
def test_source(make: Callable[[Path], Path], tmp_path: Path) -> None:
    assert prepare("--source", make(tmp_path), "--out", tmp_path / "store", "--holdout", 0) == 0
    assert texts_of(tmp_path / "store") == TEXTS


@pytest.mark.parametrize("streaming", [False, True])
def test_data_set_by_name_with_configuration_and_split(tmp_path: Path, streaming: bool) -> None:
    """What a hub name goes through, on a local folder with the hub's layout."""
    folder = tmp_path / "dataset"
    for config, records in (("small", RECORDS[:2]), ("large", RECORDS)):
        (folder / config).mkdir(parents=True)
        datasets.Dataset.from_list(records).to_parquet(str(folder / config / "part.parquet"))
    entries = "\n".join(
        f"- config_name: {c}\n  data_files:\n  - split: extra\n    path: {c}/*.parquet" for c in ("small", "large")
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n{entries}\n---\n")
    options = ["--name", "large", "--split", "extra", *(["--streaming"] if streaming else [])]
    prepare("--source", folder, "--out", tmp_path / "store", "--holdout", 0, *options)
    assert texts_of(tmp_path / "store") == TEXTS
    assert "no field 'body'; its fields are id, text" in fail(
        "--source", folder, "--out", tmp_path / "other", *options, "--text-field", "body"
    )
    assert "cannot be read" in fail(
        "--source", folder, "--out", tmp_path / "other", "--name", "huge", "--split", "extra"
    )


def test_a_hub_name_is_loaded_by_datasets(tmp_path: Path) -> None:
    assert find_sources(["someone/corpus"], Reading()).sources == [Source("loaded", "someone/corpus")]
    with pytest.raises(ValueError, match="--source stdlb: no such file or folder"):
        find_sources(["stdlb"], Reading())


def test_field_names_and_several_sources_in_order(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines_of([{"body": "first"}, {"body": "second"}]))
    datasets.Dataset.from_list([{"body": "third"}]).to_parquet(str(tmp_path / "b.parquet"))
    sources = [tmp_path / "a.jsonl", tmp_path / "b.parquet"]
    prepare("--source", *sources, "--out", tmp_path / "store", "--text-field", "body", "--holdout", 0)
    store = open_store(tmp_path / "store")
    assert [bytes(store.document(i) - 3).replace(b"\0", b"") for i in range(3)] == [b"first", b"second", b"third"]


def test_names_that_stand_for_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    names = [tmp_path / "none.txt", tmp_path / "empty", tmp_path / "*.txt", "task:juggling"]
    with pytest.raises(ValueError) as caught:
        prepare("--source", *names, "--out", tmp_path / "store")
    lines = str(caught.value).splitlines()
    for line, part in zip(lines, ("no such file", "has no files", "no file matches", "no such generated"), strict=True):
        assert part in line


BAD_LINES = [
    (b'{"text": "cut', "broken JSON line"),
    (b"[1, 2]", "a JSON record must be an object with fields, not list"),
    (b'{"texte": "x"}', "no field 'text' (it has texte)"),
    (b'{"text": null}', "no field 'text' (it has none)"),
    (b'{"text": 5}', "the field 'text' is int, not text"),
    (b'{"text": "\xff"}', "not UTF-8 at byte 10"),
    (b'{"text": "\\ud800"}', "the field 'text' has a lone surrogate"),
    (b'{"text": ' + b"[" * 100_000, "broken JSON line (maximum recursion depth"),
    (b'{"text": ' + b"1" * 5_000 + b"}", "broken JSON line (Exceeds the limit"),
]


@pytest.mark.parametrize(("bad", "message"), BAD_LINES)
def test_a_bad_line_is_named_or_skipped(
    tmp_path: Path, bad: bytes, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines_of(RECORDS[:3]) + bad + b"\n" + lines_of(RECORDS[3:]))
    line = fail("--source", tmp_path / "a.jsonl", "--out", tmp_path / "store")
    assert f"{tmp_path}/a.jsonl:4: " in line and message in line
    prepare("--source", tmp_path / "a.jsonl", "--out", tmp_path / "store", "--on-error", "skip", "--holdout", 0)
    out = capsys.readouterr().out
    assert f"a.jsonl:4: {message}" in out and "left out: 1 records with errors" in out
    assert texts_of(tmp_path / "store") == TEXTS
    assert open_store(tmp_path / "store").manifest["skipped"] == {"empty documents": 0, "records with errors": 1}


def test_bad_lines_in_parallel(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines_of(RECORDS * 99) + b"{\n")
    message = fail("--source", tmp_path / "a.jsonl", "--out", tmp_path / "store", "--num-proc", 2)
    assert "a.jsonl:595: broken JSON line" in message


def test_bad_rows_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    datasets.Dataset.from_list([{"text": "a"}, {"text": None}]).to_parquet(str(tmp_path / "a.parquet"))
    assert "a.parquet row 1: no field 'text'" in fail("--source", tmp_path / "a.parquet", "--out", tmp_path / "store")
    assert "no field 'body'; its fields are text" in fail(
        "--source", tmp_path / "a.parquet", "--out", tmp_path / "store", "--text-field", "body"
    )
    (tmp_path / "b.parquet").write_bytes(b"PAR1 not really")
    assert "b.parquet: cannot be read" in fail("--source", tmp_path / "b.parquet", "--out", tmp_path / "store")
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"x" * 9999)[:-9])
    assert "c.txt.gz: cannot be read" in fail("--source", tmp_path / "c.txt.gz", "--out", tmp_path / "store")
    (tmp_path / "d.txt.zst").write_bytes(b"nothing")
    assert "d.txt.zst: cannot be read" in fail("--source", tmp_path / "d.txt.zst", "--out", tmp_path / "store")
    (tmp_path / "e.json").write_text("[{]")
    assert "e.json: cannot be read" in fail("--source", tmp_path / "e.json", "--out", tmp_path / "store")
    (tmp_path / "f.csv").write_text("id,text\n1\n")
    assert "f.csv:2: no field 'text'" in fail("--source", tmp_path / "f.csv", "--out", tmp_path / "store")
    good = tmp_path / "good.txt"
    good.write_text("good")
    bad = [tmp_path / name for name in ("a.parquet", "c.txt.gz", "d.txt.zst", "e.json", "f.csv")]
    capsys.readouterr()
    prepare("--source", good, *bad, "--out", tmp_path / "store", "--on-error", "skip", "--holdout", 0)
    assert texts_of(tmp_path / "store") == ["a", "good"]
    assert "left out: 5 records with errors" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"\n\n", b'{"text": ""}\n'])
def test_empty_corpus(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    assert "the corpus is empty" in fail("--source", tmp_path / "a.jsonl", "--out", tmp_path / "store")
    assert not (tmp_path / "store").exists()


def token_records(folder: Path, records: list[dict]) -> Path:
    (folder / "t.jsonl").write_bytes(lines_of(records))
    return folder / "t.jsonl"


def counted_of(out: Path) -> list[tuple[list[int], list[int]]]:
    """Tokens and the flags of their targets, closing EOT included, of each document."""
    store = open_store(out)
    assert store.counted is not None
    starts = np.asarray(store.offsets)
    return [
        (store.document(i).tolist(), store.counted[starts[i] + 1 : starts[i + 1] + 1].tolist())
        for i in range(store.num_documents)
    ]


def test_labels_and_masks(tmp_path: Path) -> None:
    base = ["--holdout", 0, "--out"]
    source = token_records(
        tmp_path, [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [-100]}]
    )
    prepare("--source", source, "--labels-field", "labels", *base, tmp_path / "a")
    assert counted_of(tmp_path / "a") == [([5, 6, 7], [0, 1, 1, 1]), ([8], [0, 0])]
    source = token_records(
        tmp_path, [{"t": [5, 6], "m": [1, 0]}, {"t": [5, 6], "m": [0, 1, 0]}, {"t": [5, 1], "m": [1, 0]}]
    )
    prepare("--source", source, "--ids-field", "t", "--loss-mask-field", "m", *base, tmp_path / "b")
    assert counted_of(tmp_path / "b") == [([5, 6], [1, 0, 0]), ([5, 6], [0, 1, 0]), ([5], [1, 0])]
    source = token_records(tmp_path, [{"question": "ab", "text": "c"}])
    prepare("--source", source, "--prompt-field", "question", *base, tmp_path / "c")
    assert counted_of(tmp_path / "c") == [([100, 101, 102], [0, 0, 1, 1])]
    source = token_records(tmp_path, [{"input_ids": [5, 6, 7]}])
    prepare("--source", source, "--ids-field", "input_ids", *base, tmp_path / "d")
    store = open_store(tmp_path / "d")
    assert store.counted is None and store.document(0).tolist() == [5, 6, 7] and store.num_bytes == 3


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"input_ids": [5, 259], "labels": [5, 259]}, "token id 259 is outside the vocabulary of 259"),
        ({"input_ids": [-1], "labels": [-1]}, "token id -1 is outside the vocabulary"),
        ({"input_ids": [5, 6], "labels": [5]}, "'labels' has 1 entries for 2 tokens"),
        ({"input_ids": [5, 6], "labels": [5, 7]}, "'labels' must repeat 'input_ids' or be -100"),
        ({"input_ids": [5, 6.5], "labels": [5, 6]}, "'input_ids' must be a list of whole numbers"),
        ({"input_ids": [[5]], "labels": [[5]]}, "'input_ids' must be a list of whole numbers"),
        ({"input_ids": [1 << 70], "labels": [5]}, "'input_ids' must be a list of whole numbers"),
        ({"input_ids": "56", "labels": [5, 6]}, "'input_ids' must be a list of whole numbers"),
        ({"input_ids": [5, 6]}, "no field 'labels'"),
    ],
)
def test_bad_token_records(tmp_path: Path, record: dict, message: str) -> None:
    source = token_records(tmp_path, [{"input_ids": [5], "labels": [5]}, record])
    line = fail("--source", source, "--labels-field", "labels", "--out", tmp_path / "store")
    assert "t.jsonl:2: " in line and message in line


def test_token_records_from_parquet(tmp_path: Path) -> None:
    records = [{"input_ids": [5, 6], "loss_mask": [0, 1]}, {"input_ids": [7], "loss_mask": [1]}]
    datasets.Dataset.from_list(records).to_parquet(str(tmp_path / "a.parquet"))
    prepare(
        "--source", tmp_path / "a.parquet", "--loss-mask-field", "loss_mask", "--holdout", 0, "--out", tmp_path / "s"
    )
    assert counted_of(tmp_path / "s") == [([5, 6], [0, 1, 1]), ([7], [1, 1])]


def test_large_texts_are_read_whole(tmp_path: Path) -> None:
    """A document above the buffers of every reader, compressed."""
    text = "".join(chr(97 + i % 26) for i in range(3_000_000))
    buffer = io.BytesIO()
    with zstandard.ZstdCompressor().stream_writer(buffer, closefd=False) as writer:
        writer.write(text.encode())
    (tmp_path / "a.txt.zst").write_bytes(buffer.getvalue())
    prepare("--source", tmp_path / "a.txt.zst", "--out", tmp_path / "store")
    store = open_store(tmp_path / "store")
    assert bytes((store.document(0) - 3).astype(np.uint8)).decode() == text


def test_records_alone(tmp_path: Path) -> None:
    make_folder(tmp_path)
    found = find_sources([str(tmp_path / "mixed")], Reading())
    records = Records(found.sources, Reading(), ["text"], tmp_path / "cache")
    records.open()
    assert records.tally.kinds() == "4 files as text, 1 file as JSON records"
    read = [(Path(record.where).name, record.kind) for record in records]
    assert read[0] == ("c.md", "text") and read[1:3] == [("d.jsonl:1", "json"), ("d.jsonl:2", "json")]


def skipping(source: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> tuple[list[str], str]:
    """The texts that are left of a source whose bad records are skipped, and what was said of those."""
    capsys.readouterr()
    prepare("--source", source, "--out", out, "--on-error", "skip", "--holdout", 0)
    return texts_of(out), capsys.readouterr().out


def test_a_bad_row_of_a_table_costs_that_row_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "a.csv"
    table.write_bytes(b'id,text\n1,one\n2,tw\xffo\n3,three, three\n4,"four, 4"\n')
    assert "a.csv:3: the field 'text' is not UTF-8 at character 2" in fail("--source", table, "--out", tmp_path / "s")
    texts, said = skipping(table, tmp_path / "s", capsys)
    assert texts == ["four, 4", "one"]
    assert "a.csv:4: more values than the 2 columns" in said and "left out: 2 records with errors" in said
    table.write_text('id,text\n1,one\n2,"two\n3,three\n')
    texts, said = skipping(table, tmp_path / "t", capsys)
    assert texts == ["one", "three"] and "a.csv:3: a quotation mark that is not closed in its row" in said


def test_arrays_of_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    array = tmp_path / "a.json"
    array.write_bytes(b'\xef\xbb\xbf [ {"text": "b"},\n{"text": "a"} , {"text": "c"}\n]\n')
    prepare("--source", array, "--out", tmp_path / "whole", "--holdout", 0)
    assert texts_of(tmp_path / "whole") == ["a", "b", "c"]
    for number, rest in enumerate((', {"tex', ' {"text": "x"}]', "] []", "")):
        array.write_text('[{"text": "a"}, {"text": "b"}' + rest)
        texts, said = skipping(array, tmp_path / f"{number}", capsys)
        assert texts == ["a", "b"]
        assert "a.json (record 2): what follows, to the end of the file, cannot be read" in said
    array.write_text(" [ ] ")
    assert "the corpus is empty" in fail("--source", array, "--out", tmp_path / "none")


def test_separators_across_the_chunks_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("one--two---three--four")
    for chunk in (1, 2, 3, 5, 100):
        monkeypatch.setattr(readers, "_CHUNK", chunk)
        with (tmp_path / "a.txt").open("rb") as stream:
            assert list(read_parts(stream, "--")) == [b"one", b"two", b"-three", b"four"]


def test_options_of_data_sets_are_not_for_files(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines_of(RECORDS))
    for option in (["--split", "test"], ["--name", "x"], ["--streaming"]):
        message = fail("--source", tmp_path / "a.jsonl", *option, "--out", tmp_path / "s")
        assert message == "--split, --name and --streaming are for data sets; files are read whole"
