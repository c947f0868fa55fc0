"""Shows that a store opens only when it is whole, and that what was written is what is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gptb_ds.data.corpus import Corpus
from gptb_ds.data.documents import open_store, verify_store
from tests.harness.stores import numbered_documents, prepare, write_store

DOCUMENTS = numbered_documents([3, 0, 7, 1])


def test_round_trip(tmp_path: Path) -> None:
    path = write_store(tmp_path, DOCUMENTS, held_out=[[9, 8]])
    store = open_store(path)
    assert [store.document(i).tolist() for i in range(store.num_documents)] == DOCUMENTS
    assert (store.num_documents, store.num_tokens, store.num_bytes) == (4, 11, 11)
    assert Corpus([store]).bytes_per_target() == 11 / 15
    held_out = open_store(path, "validation")
    assert held_out.document(0).tolist() == [9, 8]
    assert held_out.fingerprint != store.fingerprint
    verify_store(path)


def test_fingerprint_names_the_content_alone(tmp_path: Path) -> None:
    first = open_store(write_store(tmp_path, DOCUMENTS)).fingerprint
    assert open_store(write_store(tmp_path / "elsewhere", DOCUMENTS)).fingerprint == first
    moved = shutil.move(write_store(tmp_path, DOCUMENTS), tmp_path / "moved")
    assert open_store(moved).fingerprint == first
    others = [
        write_store(tmp_path, DOCUMENTS[::-1]),
        write_store(tmp_path, DOCUMENTS, held_out=[[9]]),
        write_store(tmp_path, DOCUMENTS, tokenizer="other"),
        write_store(tmp_path, DOCUMENTS, counted=[[1] * (len(d) + 1) for d in DOCUMENTS]),
        write_store(tmp_path, [DOCUMENTS[0] + DOCUMENTS[2], [], [], DOCUMENTS[3]]),
    ]
    prints = [open_store(path).fingerprint for path in others]
    assert len({first, *prints}) == 6


def test_large_vocabulary(tmp_path: Path) -> None:
    path = write_store(tmp_path, [[70_000, 99_999]], vocab=100_000)
    assert open_store(path).document(0).tolist() == [70_000, 99_999]


def truncate(path: Path) -> None:
    file = path / "train/tokens.bin"
    file.write_bytes(file.read_bytes()[:-2])


def flip(name: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        data = bytearray((path / name).read_bytes())
        data[len(data) // 2] ^= 1
        (path / name).write_bytes(data)

    return change


def edit_manifest(path: Path) -> None:
    manifest = json.loads((path / "store.json").read_text())
    manifest["vocab_size"] = 2
    (path / "store.json").write_text(json.dumps(manifest))


def other_format(path: Path) -> None:
    manifest = json.loads((path / "store.json").read_text())
    manifest["format"] = "gptb-ds store 99"
    (path / "store.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"tokens.bin: has 30 bytes instead of 32 \(truncated or altered\)"),
        (flip("train/tokens.bin"), "tokens.bin: altered since the store was written"),
        (flip("train/offsets.bin"), "offsets.bin: altered since the store was written"),
        (lambda path: (path / "train/tokens.bin").unlink(), "tokens.bin: missing"),
        (lambda path: (path / "store.json").unlink(), "not a document store, store.json is missing"),
        (lambda path: (path / "store.json").write_text("{"), "store.json: cannot be read"),
        (edit_manifest, "store.json: altered since it was written"),
        (other_format, "not of the format 'gptb-ds store 1'"),
        (shutil.rmtree, "there is no such folder"),
    ],
)
def test_damage_is_noticed_on_opening(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    path = write_store(tmp_path, DOCUMENTS)
    damage(path)
    with pytest.raises(ValueError, match=message) as caught:
        open_store(path)
    assert len(str(caught.value).splitlines()) == 1


def test_no_documents_and_no_such_split(tmp_path: Path) -> None:
    path = write_store(tmp_path, DOCUMENTS)
    with pytest.raises(ValueError, match="'validation' has no documents; prepare it with a larger --holdout"):
        open_store(path, "validation")
    with pytest.raises(ValueError, match="no split 'test'; choose one of train, validation"):
        open_store(path, "test")


def test_a_large_file_is_sampled_on_opening_and_read_whole_by_verify(tmp_path: Path) -> None:
    tokens = np.arange(9_000_000) % 290 + 2  # 18 MB: above what is read whole
    path = write_store(tmp_path, [tokens])  # type: ignore[list-item]
    open_store(path)
    file = path / "train/tokens.bin"
    whole = file.read_bytes()
    for shifted in (b"\2\0" + whole[:-2], whole[:-1] + b"\7", b"\7" + whole[1:]):
        file.write_bytes(shifted)
        with pytest.raises(ValueError, match="altered"):
            open_store(path)
    between = 65536 + 1000  # blocks are 70 kB apart here
    file.write_bytes(whole[:between] + bytes([whole[between] ^ 1]) + whole[between + 1 :])
    open_store(path)
    with pytest.raises(ValueError, match="altered"):
        verify_store(path)


def test_verify_finds_ids_beyond_the_vocabulary(tmp_path: Path) -> None:
    path = write_store(tmp_path, [[5, 299]])
    verify_store(path)
    path = write_store(tmp_path, [[5, 300]])
    with pytest.raises(ValueError, match=r"beyond the vocabulary \(300\)"):
        verify_store(path)


def test_an_altered_tokenizer_is_noticed_on_opening(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text")
    prepare("--source", tmp_path / "a.txt", "--out", tmp_path / "store")
    with next((tmp_path / "store/tokenizer").glob("*.json")).open("a") as file:
        file.write(" ")
    with pytest.raises(ValueError, match=r"tokenizer/.*has \d+ bytes instead of"):
        open_store(tmp_path / "store")
