"""What a run writes beside its checkpoints: sinks follow the metrics, and neither they nor a pipe can end training."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gptb_ds.checkpoint.format import checkpoint_folder
from gptb_ds.data.writer import write_manifest
from gptb_ds.training.metrics import read_metrics
from tests.harness import faults
from tests.harness.sinks import READERS, expected
from tests.harness.stores import prepare
from tests.harness.training import TINY, losses, metrics, rewind, train

pytestmark = pytest.mark.slow
MONITOR = ["tensorboard", "csv", "wandb"]


@pytest.fixture(scope="module")
def monitored(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with all sinks, trained to its end."""
    pytest.importorskip("wandb")
    run = tmp_path_factory.mktemp("runs") / "monitored"
    train(run, store, run__monitor=MONITOR, fault=faults.wandb_offline)
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


def test_sinks_follow_the_metrics_through_kill_resume_and_never(monitored: Path, store: Path, tmp_path: Path):
    assert_sinks_follow(monitored)
    run = rewind(monitored, tmp_path / "run", 8)  # a kill after update 12 leaves metrics and sinks beyond update 8
    train(run, store, run__monitor=MONITOR, fault=faults.wandb_offline)
    assert metrics(run) == metrics(monitored)
    assert_sinks_follow(run)
    train(run, store, run__monitor=MONITOR, fault=faults.wandb_offline, run__resume="never", train__updates=6)
    assert_sinks_follow(run)
    (aside,) = run.glob("previous-*")
    assert metrics(aside) == metrics(monitored)
    assert_sinks_follow(aside)


def test_a_refused_start_changes_nothing(monitored: Path, store: Path, tmp_path: Path):
    run = rewind(monitored, tmp_path / "refused", 12)
    faults.flipped_byte(checkpoint_folder(run, 12))
    with (run / "metrics.jsonl").open("a") as file:
        file.write("nonsense\n")
    before = files_of(run)
    for words, options in (
        ("metrics.jsonl:", {}),
        ("data.seed was 0", {"data__seed": 9}),
        ("train.updates 6: ", {"train__updates": 6}),
        ("is after 8 updates already", {"train__updates": 6}),
    ):
        job = train(run, store, expect=2, run__monitor=MONITOR, fault=faults.wandb_offline, **options)
        assert words in job.text(0) and "Traceback" not in job.text(0)
        assert files_of(run) == before
    shutil.rmtree(run / "tensorboard")
    before = files_of(run)
    train(run, store, expect=2, run__monitor=MONITOR, fault=faults.wandb_offline, model__n_embd=32)
    assert files_of(run) == before, "no sink begins before all is checked"


def test_metrics_that_were_lost_are_said(monitored: Path, store: Path, tmp_path: Path):
    run = rewind(monitored, tmp_path / "run", 8)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["update"] <= 3))
    job = train(run, store)
    assert f"WARNING: {run}/metrics.jsonl ends after update 3: the lines up to update 8 are lost" in job.text(0)


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
    args = ["--labels-field", "labels", "--holdout", "0", "--out", folder / "store"]
    assert prepare("--source", folder / "records.jsonl", *args) == 0
    return folder / "store"


def test_a_store_in_which_nothing_counts_is_refused(tmp_path: Path):
    store = masked_store(tmp_path / "masked", 1)
    counted = store / "train" / "counted.bin"
    counted.write_bytes(bytes(counted.stat().st_size))  # as when all that counts is held out
    facts = json.loads((store / "store.json").read_text())
    (store / "store.json").unlink()
    derived = ("format", "files", "fingerprint", "manifest_checksum")
    write_manifest(store, {key: value for key, value in facts.items() if key not in derived})
    job = train(tmp_path / "nothing", store, expect=2)
    assert "no target of the training split counts in the loss" in job.text(0)
    assert not (tmp_path / "nothing" / "metrics.jsonl").exists()


def test_what_was_not_counted_has_no_loss(tmp_path: Path):
    """Windows of 8 x 6 tokens of which nearly none counts: a loss of 0.0 would read as learnt by heart."""
    job = train(tmp_path / "sparse", masked_store(tmp_path / "few", 3), run__monitor=["csv"])
    found = [line["loss"] for line in read_metrics(tmp_path / "sparse" / "metrics.jsonl") if "tokens" in line]
    assert len(found) == 12 and 0.0 not in found and None in found
    assert job.text(0).count("counts in the loss, which is null then") == 1
    assert "| loss - |" in job.text(0) and "bpb" not in job.text(0), "nor bits per byte where no bytes are known"
    assert len((tmp_path / "sparse/csv/sparse/Train_loss.csv").read_text().splitlines()) == 13 - found.count(None)


def test_checkpoints_behind_a_link_stay_there(monitored: Path, store: Path, tmp_path: Path):
    run, scratch = rewind(monitored, tmp_path / "linked", 8), tmp_path / "scratch"
    (run / "checkpoints").rename(scratch)
    (run / "checkpoints").symlink_to(scratch)
    job = train(run, store)
    assert "(update 8)" in job.text(0) and metrics(run) == metrics(monitored)
    train(run, store, run__resume="never", train__updates=4)
    assert (run / "checkpoints").is_symlink() and checkpoint_folder(run, 4).resolve().parent == scratch
    assert checkpoint_folder(run / "previous-001", 12).resolve().is_relative_to(scratch)
    assert metrics(run / "previous-001") == metrics(monitored)
    scratch.rename(tmp_path / "unmounted")
    before = metrics(run)
    job = train(run, store, expect=2)
    assert "checkpoints (a link to " in job.text(0) and "leads nowhere" in job.text(0)
    assert metrics(run) == before


def test_checkpoints_that_were_moved_away_cost_no_metrics(monitored: Path, store: Path, tmp_path: Path):
    run = rewind(monitored, tmp_path / "moved", 12)
    (run / "checkpoints").rename(tmp_path / "elsewhere")
    job = train(run, store, train__updates=4)
    assert "no checkpoint in" in job.text(0) and "starts over" in job.text(0)
    assert metrics(run / "previous-001") == metrics(monitored)
    (run / "checkpoints").rename(tmp_path / "elsewhere-too")
    (run / "checkpoints").write_text("a file")
    assert "is no folder" in train(run, store, expect=2).text(0)
