"""Shows `gptb-ds prepare`: what it makes of its options, that it is instant the second time and never half done."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from gptb_ds.data.corpus import Corpus
from gptb_ds.data.documents import DocumentStore, load_tokenizer, open_store, verify_store
from tests.harness.stores import fail, prepare, texts_of

TEXTS = {"a.txt": "first document", "b.txt": "zweites Dokument, größer", "sub/c.txt": "third\r\n" * 40, "d.txt": "vier"}


def texts_below(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): p.read_bytes().decode() for p in folder.rglob("[!.]*") if p.is_file()}


def leftovers(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if p.name.endswith((".partial", ".old"))]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in TEXTS.items():
        file = tmp_path / "texts" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text.encode())
    return tmp_path / "texts"


def test_bytes_round_trip(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "empty.txt").write_text("")
    assert prepare("--source", folder, "--out", tmp_path / "store") == 0
    assert texts_of(tmp_path / "store") == sorted(TEXTS.values())
    assert "left out: 1 empty documents" in capsys.readouterr().out
    store = open_store(tmp_path / "store")
    assert (store.tokenizer, store.vocab_size, store.eot_id) == ("bytes", 259, 1)
    held_out = open_store(tmp_path / "store", "validation")
    assert held_out.num_documents == 1 and store.num_documents == 3
    assert store.num_bytes + held_out.num_bytes == sum(len(text.encode()) for text in TEXTS.values())
    verify_store(tmp_path / "store")
    assert not leftovers(tmp_path)


def test_text_that_spells_a_special_token_stays_text(tmp_path: Path) -> None:
    text = "a</s>b<pad>c<|endoftext|>d"
    (tmp_path / "a.txt").write_text(text)
    for tokenizer in ("bytes", "bpe:300"):
        out = tmp_path / tokenizer.replace(":", "-")
        prepare("--source", tmp_path / "a.txt", "--tokenizer", tokenizer, "--out", out)
        store = open_store(out)
        assert store.eot_id not in store.document(0)
        assert texts_of(out) == [text]


def test_trained_bpe_and_tokenizers_by_folder(folder: Path, tmp_path: Path) -> None:
    (folder / "long.txt").write_text("the cat sat on the mat. " * 200)
    assert prepare("--source", folder, "--tokenizer", "bpe:280", "--out", tmp_path / "bpe") == 0
    store = open_store(tmp_path / "bpe")
    assert store.vocab_size <= 280 and Corpus([store]).bytes_per_target() > 1.2
    assert texts_of(tmp_path / "bpe") == sorted([*TEXTS.values(), "the cat sat on the mat. " * 200])
    for number, name in enumerate((tmp_path / "bpe", tmp_path / "bpe/tokenizer")):  # a store, or a tokenizer's folder
        prepare("--source", folder, "--tokenizer", name, "--out", tmp_path / f"again-{number}")
        again = open_store(tmp_path / f"again-{number}")
        assert again.fingerprint == store.fingerprint


def test_second_run_is_instant_and_changed_inputs_are_noticed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "store"
    prepare("--source", folder, "--out", out)
    written = (out / "store.json").stat().st_mtime_ns
    assert prepare("--source", folder, "--out", out) == 0
    assert "is up to date" in capsys.readouterr().out
    (folder / "e.txt").write_text("a new one")
    assert "was made from other inputs or options" in fail("--source", folder, "--out", out)
    assert (out / "store.json").stat().st_mtime_ns == written
    prepare("--source", folder, "--out", out, "--overwrite")
    assert texts_of(out) == sorted([*TEXTS.values(), "a new one"])
    assert "other inputs or options" in fail("--source", folder, "--out", out, "--tokenizer", "bpe:300")
    (out / "train/tokens.bin").write_bytes(b"")
    assert "is damaged" in fail("--source", folder, "--out", out)
    prepare("--source", folder, "--out", out, "--overwrite")
    verify_store(out)
    assert not leftovers(tmp_path)


def test_a_folder_with_something_else_is_never_replaced(folder: Path, tmp_path: Path) -> None:
    for arguments in ([], ["--overwrite"]):
        assert "not a whole document store" in fail("--source", folder / "a.txt", "--out", folder / "sub", *arguments)
        assert "lies in --source" in fail("--source", folder, "--out", folder / "sub", *arguments)
    assert texts_below(folder) == TEXTS
    store = tmp_path / "store"
    prepare("--source", folder, "--out", store)
    (store / "notes.txt").write_text("mine")
    assert "not the store's, such as" in fail("--source", folder / "a.txt", "--out", store, "--overwrite")
    assert (store / "notes.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert prepare("--source", folder, "--out", tmp_path / "empty") == 0


def _prepare_slowly(source: Path, out: Path) -> None:
    prepare("--source", source, "--tokenizer", "bpe:2000", "--out", out)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_prepare_leaves_no_store(tmp_path: Path, number: int) -> None:
    source, out = tmp_path / "texts", tmp_path / "store"
    source.mkdir()
    for part in range(120):  # seconds of work
        (source / f"{part}.txt").write_text(" ".join(str(i * i % 7919) for i in range(20_000 + part)))
    interrupted = 0
    for delay in (0.0, 0.3, 0.8):  # after the working folder is there
        process = multiprocessing.get_context("spawn").Process(target=_prepare_slowly, args=(source, out))
        process.start()
        while not leftovers(tmp_path) and process.is_alive():
            time.sleep(0.01)
        time.sleep(delay)
        assert process.pid is not None and process.is_alive()
        os.kill(process.pid, number)
        process.join()
        if number == signal.SIGINT and process.exitcode == 0:
            # Python loses a KeyboardInterrupt now and then, in callbacks of its import locks: then the store is whole.
            verify_store(out)
            shutil.rmtree(out)
            continue
        interrupted += 1
        assert process.exitcode != 0
        assert not out.exists()
        with pytest.raises(ValueError, match="no such folder"):
            open_store(out)
        if number == signal.SIGINT:
            assert not leftovers(tmp_path)
    assert interrupted
    (tmp_path / "small.txt").write_text("good " * 9)
    prepare("--source", tmp_path / "small.txt", "--out", out)
    assert not leftovers(tmp_path)
    verify_store(out)


def test_an_unfinished_folder_is_not_a_store(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "store"
    prepare("--source", folder, "--out", out)
    out.rename(tmp_path / ".store.partial")  # killed before the last rename
    (tmp_path / ".store.partial/store.json").unlink()  # and before the manifest
    with pytest.raises(ValueError, match=r"store.json is missing \(an interrupted prepare leaves none\)"):
        open_store(tmp_path / ".store.partial")
    prepare("--source", folder, "--out", out)
    assert not leftovers(tmp_path)


def test_failed_prepare_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    (folder / "bad.txt").write_bytes(b"abc\xff\xfe")
    assert "bad.txt: not UTF-8 at byte 3" in fail("--source", folder, "--out", tmp_path / "store")
    assert not (tmp_path / "store").exists() and not leftovers(tmp_path)


def test_held_out_split_is_by_content(tmp_path: Path) -> None:
    lines = [f"document number {i} of many" for i in range(300)]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    (tmp_path / "b.txt").write_text("\n".join(reversed(lines)))

    def held_out(name: str, share: float) -> set[str]:
        out = tmp_path / f"{name}-{share}"
        prepare("--source", tmp_path / name, "--separator", "\n", "--holdout", share, "--out", out)
        store, tokenizer = open_store(out, "validation"), load_tokenizer(out)
        return {tokenizer.decode(store.document(i).tolist()) for i in range(store.num_documents)}

    tenth = held_out("a.txt", 0.1)
    assert 15 < len(tenth) < 50
    assert held_out("b.txt", 0.1) == tenth
    assert held_out("a.txt", 0.02) < tenth


def test_holdout_at_its_limits(folder: Path, tmp_path: Path) -> None:
    def counts(*arguments: object) -> list[int]:
        out = tmp_path / f"store-{len(list(tmp_path.iterdir()))}"
        prepare("--source", *arguments, "--out", out)
        return [DocumentStore(out, s, open_store(out).manifest).num_documents for s in ("train", "validation")]

    assert counts(folder, "--holdout", 0) == [4, 0]
    assert counts(folder, "--holdout", 1e-9) == [3, 1]
    assert counts(folder, "--holdout", 0.999999) == [1, 3]
    assert counts(folder / "a.txt") == [1, 0]
    shutil.copy(folder / "a.txt", tmp_path / "a-copy.txt")
    assert counts(folder / "a.txt", tmp_path / "a-copy.txt") == [2, 0]  # equal documents stay on one side


def test_parallel_tokenisation_gives_the_same_store(folder: Path, tmp_path: Path) -> None:
    prints = []
    for processes in (1, 2, 9):
        prepare("--source", folder, "--num-proc", processes, "--out", tmp_path / f"{processes}")
        prints.append(open_store(tmp_path / f"{processes}").fingerprint)
    assert len(set(prints)) == 1


def test_describe(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare("--source", folder, "--out", tmp_path / "store", "--holdout", 0)
    capsys.readouterr()
    assert prepare("--describe", tmp_path / "store", "--verify", "--lanes", 2, "--window", 4) == 0
    text = capsys.readouterr().out
    total = sum(len(t.encode()) + 1 for t in TEXTS.values())
    for part in (
        f"train        4 documents, {total - 4} tokens",
        open_store(tmp_path / "store").manifest["fingerprint"],
        "8 to 15",
        f"an epoch is {total} targets",
        f"2 lanes, window 4: {total / 8:,.1f} windows an epoch",
        "verified",
    ):
        assert part in text
    prepare("--describe", tmp_path / "store", "--max-document-tokens", 10)
    assert "cut into 34 pieces" in capsys.readouterr().out
    assert "not a document store" in fail("--describe", folder)


def test_all_option_errors_at_once() -> None:
    with pytest.raises(ValueError) as caught:
        prepare(
            "--tokenizer", "bpe:12", "--holdout", 1, "--num-proc", 0, "--labels-field", "l", "--loss-mask-field", "m"
        )
    lines = str(caught.value).splitlines()
    assert "lanes 0: must be at least 1" in fail("--describe", "x", "--lanes", 0)
    assert "--prompt-field: is for text" in fail(
        "--source", "x", "--out", "y", "--prompt-field", "p", "--ids-field", "i"
    )
    assert [line.split()[0] for line in lines] == [
        "--source:",
        "--out:",
        "--holdout",
        "--labels-field",
        "--num-proc",
        "--tokenizer",
    ]


def test_unknown_tokenizer(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message = fail("--source", folder, "--tokenizer", folder, "--out", tmp_path / "store")
    assert "no such tokenizer" in message and "give bytes, bpe:SIZE" in message


def test_tokenizer_without_an_end(folder: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE())).save_pretrained(tmp_path / "tokenizer")
    message = fail("--source", folder, "--tokenizer", tmp_path / "tokenizer", "--out", tmp_path / "store")
    assert "neither an end nor a beginning of sequence token" in message


@pytest.mark.slow
def test_standard_library(tmp_path: Path) -> None:
    prepare("--source", "stdlib", "--out", tmp_path / "store")
    store = open_store(tmp_path / "store")
    assert store.num_documents > 400 and 8e6 < store.num_tokens < 20e6
    assert open_store(tmp_path / "store", "validation").num_documents > 10


def test_what_a_small_corpus_holds_out_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    book = tmp_path / "book.txt"
    book.write_text("word " * 100)
    prepare("--source", book, "--out", tmp_path / "one")
    assert "warning: nothing is held out: it takes two different documents" in capsys.readouterr().out
    notes = [tmp_path / f"{number}.txt" for number in range(9)]
    for number, note in enumerate(notes):
        note.write_text(f"note {number} " * 9)
    prepare("--source", *notes, "--out", tmp_path / "few", "--holdout", 0.05)
    assert "of the tokens are held out" not in capsys.readouterr().out
    prepare("--source", *notes[:3], "--out", tmp_path / "fewer", "--holdout", 0.05)
    assert "warning: 33% of the tokens are held out, in 1 of few documents" in capsys.readouterr().out
    prepare("--source", book, "--out", tmp_path / "all", "--holdout", 0)
    assert "warning" not in capsys.readouterr().out


def test_a_place_that_cannot_be_written(folder: Path) -> None:
    message = fail("--source", folder / "b.txt", "--out", folder / "a.txt" / "store")
    assert "a.txt/store: cannot be written" in message and "choose another folder" in message


def test_a_folder_named_like_a_tokenizer_changes_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare("--source", folder, "--out", tmp_path / "store")
    (tmp_path / "bytes").mkdir()
    (tmp_path / "bytes/file").write_text("x")
    monkeypatch.chdir(tmp_path)
    prepare("--source", folder, "--out", tmp_path / "store")
    assert "is up to date" in capsys.readouterr().out
