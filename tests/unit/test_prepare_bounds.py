"""Shows that what prepare costs is bounded: memory by a batch, time by the size of the input, disk by the store."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gptb_ds.data import build, long_texts, tokenization
from gptb_ds.data.build import _batches
from gptb_ds.data.documents import load_tokenizer, open_store
from gptb_ds.data.encoding import held_out_key
from gptb_ds.data.json_records import read_json
from gptb_ds.data.record import Record
from gptb_ds.data.sources import Reading, find_sources
from gptb_ds.data.writer import write_manifest
from tests.harness.stores import prepare, texts_of
from tests.unit.test_text_stream import TOKENIZERS

MIB = 1 << 20


def peak_memory(*arguments: object) -> int:
    """The most memory (bytes) that `gptb-ds prepare` has used with these arguments, in a process of its own."""
    program = (
        "import resource, sys\nfrom gptb_ds.cli import main\ncode = main(sys.argv[1:])\n"
        "print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)\nsys.exit(code)"
    )
    command = [sys.executable, "-c", program, "prepare", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split("peak ")[1])


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_large_files(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for count in (4, 40):
        (tmp_path / f"{count}").mkdir()
        for number in range(count):
            (tmp_path / f"{count}/{number}.txt").write_bytes(rng.integers(97, 123, 2 * MIB, dtype=np.uint8).tobytes())
    few, many = (
        peak_memory(
            "--source", tmp_path / f"{count}", "--num-proc", 1, "--holdout", 0, "--out", tmp_path / f"store-{count}"
        )
        for count in (4, 40)
    )
    assert many - few < 24 * MIB  # of 72 MiB of text


def test_a_batch_is_bounded_by_number_and_by_size() -> None:
    records = [Record(f"{n}", "text", b"", size) for n, size in enumerate([1] * 300 + [5 * MIB] * 4 + [99 * MIB, 1])]
    batches = list(_batches(records))
    assert [r for batch in batches for r in batch] == records
    assert max(len(batch) for batch in batches) <= 128
    assert all(len(batch) == 1 or sum(r.size for r in batch) <= 8 * MIB for batch in batches)


def test_many_files_are_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cost of a list of files is counted in looks at the disk, a few for each file."""
    for number in range(3000):
        (tmp_path / f"{number}.txt").touch()
    looks = 0
    stat = os.stat

    def counted(*args: object, **options: object) -> os.stat_result:
        nonlocal looks
        looks += 1
        return stat(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "stat", counted)
    (source,) = find_sources([str(tmp_path)], Reading()).sources
    assert len(source.files) == 3000
    assert looks < 3 * 3000


@pytest.mark.parametrize("alphabet", ["ACGT", "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"])
def test_bpe_is_trained_on_text_without_blanks(alphabet: str, tmp_path: Path) -> None:
    """Two files of 256 KiB: with the cost of a square this is not done in minutes (pytest's time limit)."""
    texts = ["".join(random.Random(n).choices(alphabet, k=MIB // 4)) for n in range(2)]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text)
    prepare("--source", tmp_path / "*.txt", "--tokenizer", "bpe:700", "--holdout", 0, "--out", tmp_path / "store")
    store, tokenizer = open_store(tmp_path / "store"), load_tokenizer(tmp_path / "store")
    assert [tokenizer.decode(store.document(n).tolist()) for n in range(2)] == texts
    assert store.num_tokens < MIB // 2


def test_words_below_the_cut_are_whole_in_a_trained_bpe(tmp_path: Path) -> None:
    word = "donaudampfschifffahrtselektrizitaetenhauptbetriebswerkbau"
    (tmp_path / "a.txt").write_text(f"the {word} of the {word} " * 99)
    prepare("--source", tmp_path / "a.txt", "--tokenizer", "bpe:900", "--out", tmp_path / "store")
    tokenizer = load_tokenizer(tmp_path / "store")
    assert len(tokenizer.encode(f" {word}")) == 1
    assert tokenizer.decode(tokenizer.encode("x " * 99 + "y" * 999)) == "x " * 99 + "y" * 999


def test_nothing_but_the_store_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies on the disk when everything is written and nothing is removed yet: two bytes for each of the text."""
    text = "text " * 200_000
    (tmp_path / "a.jsonl").write_text(f'{{"text": "{text}"}}\n{{"text": "other"}}\n')
    sizes = []

    def measured(folder: Path, facts: dict) -> dict:
        sizes.append(sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()))
        return write_manifest(folder, facts)

    monkeypatch.setattr(build, "write_manifest", measured)
    prepare("--source", tmp_path / "a.jsonl", "--holdout", 0.5, "--out", tmp_path / "store")
    assert 2 * len(text) < sizes[0] < 2.1 * len(text)


@pytest.mark.parametrize("kind", ["array", "array in a line", "objects over lines"])
def test_a_large_json_file_is_read_record_by_record(kind: str, tmp_path: Path) -> None:
    """What is in memory is counted in what was read of the file when a record comes: no more than a few MiB ahead."""
    records = [{"text": f"{number} " + "text " * 20_000} for number in range(200)]  # 20 MB
    if kind == "objects over lines":
        (tmp_path / "a.json").write_text("\n".join(json.dumps(record, indent=1) for record in records))
    else:
        (tmp_path / "a.json").write_text(json.dumps(records, indent=1 if kind == "array" else None))
    with (tmp_path / "a.json").open("rb") as stream:
        found = []
        for number, record in enumerate(read_json(stream, "a.json", ["text"]), 1):
            assert stream.tell() < number * 101_000 + 4 * MIB
            found.append(record.content)
    assert found == records


def test_an_object_of_any_size_over_lines_is_read(tmp_path: Path) -> None:
    records = [{"text": f"{number} " + "text " * 20_000} for number in range(40)]  # 4 MB, read in pieces of one
    (tmp_path / "a.json").write_text(json.dumps({"version": 1, "data": records}, indent=1))
    prepare("--source", tmp_path / "a.json", "--out", tmp_path / "store")
    assert texts_of(tmp_path / "store") == sorted(record["text"] for record in records)


SOME_WORDS = ["the", "naïve", "東京", "🙂🙃", "isn't", "'no'.", " ", "\n\n", "\t", "日本語の文", "A" * 90, "</s>", "12"]


@pytest.mark.parametrize("name", [name for name in TOKENIZERS if name != "bytes (ByT5)"])
def test_a_long_text_has_the_tokens_of_the_whole_text(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut into pieces that fit in memory, whatever the tokenizer does with blanks and at a text's beginning."""
    monkeypatch.setattr(long_texts, "LONGEST", 700)
    tokenizer, rng = TOKENIZERS[name], random.Random(1)
    texts = [between.join(rng.choices(SOME_WORDS, k=900)) for between in ("", " ", "\n")]
    texts += [" " * 3000, "hello world. " * 300, "x " + "".join(rng.choices("ACGT", k=3000)), "a1" * 1500, ""]
    whole = [tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] for text in texts]
    seen = []

    def watched(tokenizer: object, group: list[str], **options: bool) -> object:
        seen.extend(map(len, group))
        return call(tokenizer, group, **options)

    call = tokenization._call
    monkeypatch.setattr(tokenization, "_call", watched)
    assert [row.tolist() for row in tokenization.encode(tokenizer, texts)] == whole
    if name == "byte-level BPE":
        assert max(seen) <= 700


def test_texts_are_tokenised_in_groups_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenization, "_AT_ONCE", 1000)
    numbered = [(number, "x" * size) for number, size in enumerate([10] * 500 + [999, 1, 1, 5000, 1])]
    groups = list(tokenization._groups(iter(numbered)))
    assert [pair for group in groups for pair in group] == numbered
    assert all(len(group) == 1 or sum(len(piece) for _, piece in group) <= 1000 for group in groups)


def test_a_bpe_is_trained_on_a_sample_that_no_order_changes() -> None:
    texts = [f"text number {number}" for number in range(2000)]
    taken = list(long_texts.sample(texts, 5000, held_out_key))
    assert 4900 < sum(map(len, taken)) <= 5000
    assert taken == [text for text in texts if text in set(taken)]
    assert sorted(long_texts.sample(reversed(texts), 5000, held_out_key)) == sorted(taken)
    assert list(long_texts.sample(texts, 1 << 20, held_out_key)) == texts
    assert "".join(long_texts.parts(" ".join(texts) * 20)) == " ".join(texts) * 20


def test_records_that_are_all_bad_are_left_out(tmp_path: Path) -> None:
    """More of them than a batch holds, with a tokenizer of a library that refuses to be given nothing."""
    lines = ["{broken"] * 300 + [json.dumps({"text": f"text {number}"}) for number in range(9)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    options = ("--tokenizer", "bpe:300", "--on-error", "skip", "--out", tmp_path / "store")
    prepare("--source", tmp_path / "a.jsonl", *options)
    assert texts_of(tmp_path / "store") == [f"text {number}" for number in range(9)]
