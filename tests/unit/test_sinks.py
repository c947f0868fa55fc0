"""The metric sinks hold what metrics.jsonl holds, nothing else, and never stand in training's way."""

from __future__ import annotations

import math
import os
import resource
import sys
from pathlib import Path

import pytest

from gptb_ds.config import ConfigError, OptimConfig, RunConfig, TrainConfig
from gptb_ds.training.metrics import Metrics, read_metrics
from gptb_ds.training.reporter import Reporter
from gptb_ds.training.sinks import CsvSink, check_sinks
from gptb_ds.training.train_state import RunFacts
from tests.harness.processes import run_script
from tests.harness.sinks import READERS, Rows, csv_files, expected, tensorboard


def reporter_of(run: Path, monitor: list[str], on_save_error: str = "stop") -> Reporter:
    run.mkdir(exist_ok=True)
    config = RunConfig(dir=str(run), monitor=monitor, on_save_error=on_save_error)
    return Reporter(RunFacts(4, 4, OptimConfig(), TrainConfig(), config, 0.9, {}, {}), speaks=True)


def line(update: int, loss: float | None = 0.5) -> Metrics:
    return {"update": update, "loss": loss, "grad_norm": 2.0, "lr": 0.125, "tokens_per_second": 9.0}


def assert_follows(rows: Rows, run: Path) -> None:
    want = expected(run)
    assert want and rows.keys() == want.keys()
    for key, values in want.items():
        assert rows[key] == pytest.approx(values, rel=1e-6), key  # and so many of them: no row twice


@pytest.fixture(params=READERS)
def sink(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "wandb":
        pytest.importorskip("wandb")
        monkeypatch.setenv("WANDB_MODE", "offline")
        monkeypatch.setenv("WANDB_SILENT", "true")
    return request.param


def test_a_sink_follows_the_metrics(sink: str, tmp_path: Path):
    run = tmp_path / "run"
    first = reporter_of(run, [sink])
    first.follow(-1)
    first.evaluation({"update": 0, "eval_loss": 5.0, "eval_bits_per_byte": None})
    for update, loss in ((1, 0.5), (2, math.nan), (3, None), (4, 0.25), (5, 0.125)):
        first.update(line(update, loss))
    first.close()
    assert_follows(READERS[sink](run), run)
    again = reporter_of(run, [sink])
    again.follow(4)  # as after a kill: the checkpoint is older than the metrics
    again.update(line(5, 0.75))
    again.evaluation({"update": 5, "eval_loss": 4.0, "eval_bits_per_byte": 3.0})
    again.close()
    assert [values["update"] for values in read_metrics(run / "metrics.jsonl")] == [0, 1, 2, 3, 4, 5, 5]
    assert_follows(READERS[sink](run), run)
    third = reporter_of(run, [sink])
    third.follow(5)  # as after a stop on request
    third.update(line(6))
    third.close()
    assert_follows(READERS[sink](run), run)


def test_a_sink_that_was_never_there_gets_what_came_before(sink: str, tmp_path: Path):
    run = tmp_path / "run"
    first = reporter_of(run, [])
    first.follow(-1)
    first.update(line(1))
    first.close()
    second = reporter_of(run, [sink])
    second.follow(1)
    second.update(line(2))
    second.close()
    assert_follows(READERS[sink](run), run)


def test_tensorboard_keeps_the_times_of_what_it_had(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def times() -> list[float]:
        (file,) = (tmp_path / "tensorboard").rglob("*tfevents*")
        return [event.wall_time for event in EventAccumulator(str(file)).Reload().Scalars("Train/loss")]

    first = reporter_of(tmp_path, ["tensorboard"])
    first.follow(-1)
    first.update(line(1))
    first.update(line(2))
    first.close()
    before = times()
    second = reporter_of(tmp_path, ["tensorboard"])
    second.follow(1)
    second.close()
    assert times() == before[:1]


@pytest.mark.parametrize("on_save_error", ["stop", "continue"])
def test_a_full_disk_of_sinks_ends_nothing(on_save_error: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The metrics are where there is room; a limit on the size of files stands for the disk of the sinks."""
    reporter = reporter_of(tmp_path / "run", ["tensorboard", "csv"], on_save_error)
    reporter.follow(-1)
    reporter.update(line(1))
    reporter._log.close()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    room = reporter._log._file
    room.write, room_write = lambda content: None, room.write  # type: ignore[method-assign]
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (150, before[1]))
        for update in range(2, 40):
            reporter.update(line(update))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        room.write = room_write  # type: ignore[method-assign]
    for update in range(2, 40):
        reporter._log.write(line(update))
    reporter.update(line(40))
    reporter.close()
    said = capsys.readouterr().out
    assert said.count("WARNING: run.monitor tensorboard") == 1 and said.count("WARNING: run.monitor csv") == 1
    assert "File too large" in said
    for rows in (tensorboard(tmp_path / "run"), csv_files(tmp_path / "run")):
        assert_follows(rows, tmp_path / "run")  # and nothing was lost or torn


def test_a_sink_that_cannot_begin_is_named_once_and_left_out(
    sink: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = tmp_path / "run"
    reporter = reporter_of(run, [sink, "csv"])
    (run / sink).write_text("a file where the sink's folder is to be")
    reporter.follow(-1)
    for update in range(1, 4):
        reporter.update(line(update))
    reporter.close()
    assert capsys.readouterr().out.count(f"WARNING: run.monitor {sink}: ") == 1
    assert [values["update"] for values in read_metrics(run / "metrics.jsonl")] == [1, 2, 3]
    assert sink == "csv" or csv_files(run).keys() == expected(run).keys()
    (run / sink).unlink()
    again = reporter_of(run, [sink])
    again.follow(3)
    again.close()
    assert_follows(READERS[sink](run), run)


def test_wandb_without_a_key_is_refused_in_one_line(tmp_path: Path):
    pytest.importorskip("wandb")
    program, said = tmp_path / "program.py", tmp_path / "said"

    def code_with(**variables: str) -> int:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
        program.write_text(
            "import os\nos.environ.clear()\n"
            f"os.environ.update({clean | {'HOME': '/nonexistent'} | variables!r})\n"
            "from gptb_ds.training.sinks import check_sinks\ncheck_sinks(['wandb'])\n"
        )
        return run_script(program, [], said)

    for more, words in (({}, "no API key"), ({"WANDB_API_KEY": "short"}, "API key must have")):
        assert code_with(**more) == 1
        last = said.read_text().strip().splitlines()[-1]
        assert "ConfigError: run.monitor wandb: " in last and words in last and "WANDB_MODE=offline" in last
    assert code_with(WANDB_MODE="offline") == 0, said.read_text()


def test_a_sink_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"run\.monitor wandb: the package wandb is not installed"):
        check_sinks(["wandb"])


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (b"[]\n", "metrics.jsonl:2: not a line of metrics"),
        (b'{"loss": 1.0}\n', "metrics.jsonl:2: not a line of metrics"),
        (b'{"update": "7"}\n', "metrics.jsonl:2: not a line of metrics"),
        (b'{"update": true}\n', "metrics.jsonl:2: not a line of metrics"),
        (b'{"update": 7, "loss": "low"}\n', "metrics.jsonl:2: 'loss' is 'low' and no number"),
        (b'{"update": 7\xff}\n', "metrics.jsonl:2: not a JSON line"),
        (b"[" * 100_000 + b"\n", "metrics.jsonl:2: not a JSON line"),
        (b'{"update": -3, "loss": 1.0}\n', "metrics.jsonl:2: not a line of metrics"),
    ],
)
def test_a_broken_line_of_metrics_is_named(broken: bytes, words: str, tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"update": 1, "loss": 2.0}\n' + broken)
    with pytest.raises(ValueError) as caught:
        reporter_of(tmp_path, []).follow(1)
    assert f"{tmp_path}/{words}" in str(caught.value) and "\n" not in str(caught.value)
    assert path.read_bytes().endswith(broken), "nothing was changed"


def test_what_is_no_event_file_is_left_alone(tmp_path: Path):
    """A pipe of that name would be waited for, for ever."""
    folder = tmp_path / "tensorboard" / tmp_path.name
    folder.mkdir(parents=True)
    os.mkfifo(folder / "events.out.tfevents.1.pipe")
    (folder / "events.out.tfevents.2.folder").mkdir()
    reporter = reporter_of(tmp_path, ["tensorboard"])
    reporter.follow(-1)
    reporter.update(line(1))
    reporter.close()
    assert len([path for path in folder.iterdir() if path.is_file()]) == 1


@pytest.mark.parametrize("error", [SystemExit(3), ValueError("one\ntwo"), RecursionError(), MemoryError()])
def test_nothing_that_a_sink_raises_ends_training(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def fails(sink: CsvSink, line: Metrics) -> None:
        raise error

    monkeypatch.setattr(CsvSink, "write", fails)
    reporter = reporter_of(tmp_path, ["csv"])
    reporter.follow(-1)
    for update in (1, 2):
        reporter.update(line(update))
    reporter.close()
    assert capsys.readouterr().out.count("WARNING: run.monitor csv: ") == 1
    assert [values["update"] for values in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
