"""A file of metrics keeps what it holds when somebody removes or replaces it while a run writes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from gptb_ds.training.metrics import AppendedFile, MetricsLog
from gptb_ds.training.sinks import CsvSink, TensorBoardSink


def test_a_file_that_is_removed_is_written_anew_with_all_it_held(tmp_path: Path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write({"update": 1})
    (tmp_path / "metrics.jsonl").unlink()
    log.write({"update": 2})
    (tmp_path / "metrics.jsonl").unlink()
    log.sync()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"update": 1}\n{"update": 2}\n'


def test_training_that_goes_back_keeps_the_lines_of_a_file_that_was_removed(tmp_path: Path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for update in (1, 2, 3):
        log.write({"update": update})
    (tmp_path / "metrics.jsonl").unlink()
    assert log.cut_after(2) == [{"update": 1}, {"update": 2}]
    log.write({"update": 3})
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == [f'{{"update": {n}}}' for n in (1, 2, 3)]


def test_a_file_that_is_replaced_is_gone_on_with(tmp_path: Path):
    """As an editor does that saves it."""
    file = AppendedFile(tmp_path / "a")
    file.write(b"one\n")
    (tmp_path / "b").write_bytes(b"one, edited\n")
    (tmp_path / "b").rename(tmp_path / "a")
    file.write(b"two\n")
    assert (tmp_path / "a").read_bytes() == b"one, edited\ntwo\n"


@pytest.mark.parametrize("sink_class", [CsvSink, TensorBoardSink])
def test_a_sink_whose_folder_is_removed_says_so(tmp_path: Path, sink_class: type):
    sink = sink_class(tmp_path / "run")
    sink.follow([{"update": 1, "loss": 2.0}])
    sink.write({"update": 2, "loss": 1.5})
    kind = "csv" if sink_class is CsvSink else "tensorboard"
    for file in (tmp_path / "run" / kind / "run").iterdir():
        held = file.read_bytes()
        file.unlink()
    sink.write({"update": 3, "loss": 1.0})
    (file,) = (tmp_path / "run" / kind / "run").iterdir()
    assert file.read_bytes().startswith(held) and len(file.read_bytes()) > len(held)
    shutil.rmtree(tmp_path / "run" / kind)
    with pytest.raises(FileNotFoundError):
        sink.write({"update": 4, "loss": 0.5})
