"""Reading back what a run has sent to its metric sinks: {(name, update): [values]} of all rows that are there."""

from __future__ import annotations

import csv
import json
import struct
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from gptb_ds.training.metrics import read_metrics
from gptb_ds.training.sinks import NAMES

Rows = dict[tuple[str, int], list[float]]


def expected(run: Path) -> Rows:
    """What `metrics.jsonl` says, a row for each value."""
    rows = {}
    for line in read_metrics(run / "metrics.jsonl"):
        told = {NAMES[key]: value for key, value in line.items() if key in NAMES and value is not None}
        rows |= {(name, line["update"]): [value] for name, value in told.items()}
    return rows


def tensorboard(run: Path) -> Rows:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows: Rows = defaultdict(list)
    for file in (run / "tensorboard").rglob("*tfevents*"):
        reader = EventAccumulator(str(file), size_guidance={"scalars": 0}, purge_orphaned_data=False)
        reader.Reload()
        for name in reader.Tags()["scalars"]:
            for event in reader.Scalars(name):
                rows[name, event.step].append(event.value)
    return rows


def csv_files(run: Path) -> Rows:
    """Each file must have one header, above the rows."""
    rows: Rows = defaultdict(list)
    for file in (run / "csv").rglob("*.csv"):
        group, _, name = file.stem.partition("_")
        header, *body = csv.reader(file.open())
        assert header == ["step", name], file
        for step, value in body:
            rows[f"{group}/{name}", int(step)].append(float(value))
    return rows


def wandb_offline(run: Path) -> Rows:
    """The history of all offline runs in RUN/wandb, as `wandb sync` would send it."""
    from wandb.proto.wandb_internal_pb2 import Record

    rows: Rows = defaultdict(list)
    for file in (run / "wandb").rglob("run-*.wandb"):
        for content in _leveldb_records(file.read_bytes()):
            record = Record()
            record.ParseFromString(content)
            values = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
            step = record.history.step.num
            for name in NAMES.values():
                if name in values:
                    rows[name, step].append(json.loads(values[name]))
    return rows


def _leveldb_records(data: bytes) -> Iterator[bytes]:
    """Records of a LevelDB log with W&B's 7 bytes in front: blocks of 32 KiB, fragments of (crc, length, kind)."""
    place, record = 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        if kind == 0:  # the rest was never written
            return
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last of its fragments
            yield record
            record = b""


READERS = {"tensorboard": tensorboard, "csv": csv_files, "wandb": wandb_offline}
