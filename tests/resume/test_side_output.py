"""What a run writes beside its checkpoints: sinks follow the metrics, and neither they nor a pipe can end training."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import tests.training_runs
from gptb_ds.checkpoint.format import checkpoint_folder
from gptb_ds.cli import main
from gptb_ds.data.writer import write_manifest
from gptb_ds.training.metrics import read_metrics
from tests.metric_sinks import READERS, expected
from tests.training_runs import TINY, flip_a_byte, losses, metrics, rewind, train, with_environment

pytestmark = pytest.mark.slow
MONITOR = ["tensorboard", "csv", "wandb"]


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose runs have W&B offline."""
    pytest.importorskip("wandb")
    folder = tmp_path_factory.mktemp("offline")
    (folder / "environment.json").write_text(json.dumps({"WANDB_MODE": "offline", "WANDB_SILENT": "true"}))
    return folder


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    main_offline = functools.partial(with_environment, tests.training_runs._main)
    monkeypatch.setattr(tests.training_runs, "main_of_a_rank", main_offline)


@pytest.fixture(scope="module")
def monitored(store: Path, offline: Path) -> Path:
    """A run with all sinks, trained to its end."""
    run = offline / "monitored"
    with pytest.MonkeyPatch.context() as patch:
        main_offline = functools.partial(with_environment, tests.training_runs._main)
        patch.setattr(tests.training_runs, "main_of_a_rank", main_offline)
        train(run, store, run__monitor=MONITOR, timeout=240)
    return run


def assert_sinks_follow(run: Path) -> None:
    want = expected(run)
    assert len({update for _, update in want}) > 4
    for name, read in READERS.items():
        rows = read(run)
        assert rows.keys() == want.keys(), name  # no stray curve of a library's either
        for key, values in want.items():
            assert rows[key] == pytest.approx(values, rel=1e-6), (name, key)


def files_of(run: Path) -> dict[str, bytes]:
    return {p.relative_to(run).as_posix(): p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != "lock"}


def test_sinks_follow_the_metrics_through_kill_resume_and_never(monitored: Path, store: Path, offline: Path):
    assert_sinks_follow(monitored)
    run = rewind(monitored, offline / "run", 8)  # a kill after update 12 leaves metrics and sinks beyond update 8
    train(run, store, run__monitor=MONITOR, timeout=240)
    assert metrics(run) == metrics(monitored)
    assert_sinks_follow(run)
    train(run, store, run__monitor=MONITOR, run__resume="never", train__updates=6, timeout=240)
    assert_sinks_follow(run)
    (aside,) = run.glob("previous-*")
    assert metrics(aside) == metrics(monitored)
    assert_sinks_follow(aside)


def test_a_refused_start_changes_nothing(monitored: Path, store: Path, offline: Path):
    run = rewind(monitored, offline / "refused", 12)
    flip_a_byte(checkpoint_folder(run, 12))
    with (run / "metrics.jsonl").open("a") as file:
        file.write("nonsense\n")
    before = files_of(run)
    for words, options in (
        ("metrics.jsonl:", {}),
        ("data.seed was 0", {"data__seed": 9}),
        ("train.updates 6: ", {"train__updates": 6}),
        ("is after 8 updates already", {"train__updates": 6}),
    ):
        job = train(run, store, expect=2, run__monitor=MONITOR, **options)
        assert words in job.text(0) and "Traceback" not in job.text(0)
        assert files_of(run) == before
    shutil.rmtree(run / "tensorboard")
    before = files_of(run)
    train(run, store, expect=2, run__monitor=MONITOR, model__n_embd=32)
    assert files_of(run) == before, "no sink begins before all is checked"


def test_a_closed_pipe_ends_nothing(store: Path, tmp_path: Path):
    """Whoever reads what is printed goes away after the first line: `gptb-ds train ... | head -1`."""
    run = tmp_path / "run"
    args = [f"--{key}={value}" for key, value in (TINY | {"run.dir": run, "data.path": store}).items()]
    with (tmp_path / "errors").open("w") as errors:
        job = subprocess.Popen(
            [sys.executable, "-m", "gptb_ds", "train", *args],
            stdout=subprocess.PIPE,
            stderr=errors,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert job.stdout is not None
        job.stdout.readline()
        job.stdout.close()
        code = job.wait(240)
    assert code == 0, (tmp_path / "errors").read_text()
    assert losses(run).keys() == set(range(1, 13)) and checkpoint_folder(run, 12).is_dir()
    assert "Traceback" not in (tmp_path / "errors").read_text()


def masked_store(folder: Path, counted: int) -> Path:
    """20 tokenised documents, of whose tokens `counted` in all are labels; their bytes are not known."""
    folder.mkdir()
    records = []
    for number in range(20):
        ids = [2 + (number + n) % 200 for n in range(60)]
        labels = [token if n == 30 and number < counted else -100 for n, token in enumerate(ids)]
        records.append({"input_ids": ids, "labels": labels})
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    args = ["--labels-field", "labels", "--holdout", "0", "--out", str(folder / "store")]
    assert main(["prepare", "--source", str(folder / "records.jsonl"), *args]) == 0
    return folder / "store"


def test_a_store_in_which_nothing_counts_is_refused(offline: Path):
    store = masked_store(offline / "masked", 1)
    counted = store / "train" / "counted.bin"
    counted.write_bytes(bytes(counted.stat().st_size))  # as when all that counts is held out
    facts = json.loads((store / "store.json").read_text())
    (store / "store.json").unlink()
    derived = ("format", "files", "fingerprint", "manifest_checksum")
    write_manifest(store, {key: value for key, value in facts.items() if key not in derived})
    job = train(offline / "nothing", store, expect=2)
    assert "no target of the training split counts in the loss" in job.text(0)
    assert not (offline / "nothing" / "metrics.jsonl").exists()


def test_what_was_not_counted_has_no_loss(offline: Path):
    """Windows of 8 x 6 tokens of which nearly none counts: a loss of 0.0 would read as learnt by heart."""
    job = train(offline / "sparse", masked_store(offline / "few", 3), run__monitor=["csv"])
    found = [line["loss"] for line in read_metrics(offline / "sparse" / "metrics.jsonl") if "tokens" in line]
    assert len(found) == 12 and 0.0 not in found and None in found
    assert job.text(0).count("counts in the loss, which is null then") == 1
    assert "| loss - |" in job.text(0) and "bpb" not in job.text(0), "nor bits per byte where no bytes are known"
    assert len((offline / "sparse/csv/sparse/Train_loss.csv").read_text().splitlines()) == 13 - found.count(None)


def test_checkpoints_behind_a_link_stay_there(monitored: Path, store: Path, offline: Path):
    run, scratch = rewind(monitored, offline / "linked", 8), offline / "scratch"
    (run / "checkpoints").rename(scratch)
    (run / "checkpoints").symlink_to(scratch)
    job = train(run, store)
    assert "(update 8)" in job.text(0) and metrics(run) == metrics(monitored)
    train(run, store, run__resume="never", train__updates=4)
    assert (run / "checkpoints").is_symlink() and checkpoint_folder(run, 4).resolve().parent == scratch
    assert checkpoint_folder(run / "previous-001", 12).resolve().is_relative_to(scratch)
    assert metrics(run / "previous-001") == metrics(monitored)
    scratch.rename(offline / "unmounted")
    before = metrics(run)
    job = train(run, store, expect=2)
    assert "checkpoints (a link to " in job.text(0) and "leads nowhere" in job.text(0)
    assert metrics(run) == before


def test_checkpoints_that_were_moved_away_cost_no_metrics(monitored: Path, store: Path, offline: Path):
    run = rewind(monitored, offline / "moved", 12)
    (run / "checkpoints").rename(offline / "elsewhere")
    job = train(run, store, train__updates=4)
    assert "no checkpoint in" in job.text(0) and "starts over" in job.text(0)
    assert metrics(run / "previous-001") == metrics(monitored)
    (run / "checkpoints").rename(offline / "elsewhere-too")
    (run / "checkpoints").write_text("a file")
    assert "is no folder" in train(run, store, expect=2).text(0)
