"""`--profile`: a table that adds up to the time that has passed, a trace, and the same training."""

from __future__ import annotations

import gzip
import json

import pytest

from tests.harness.training import metrics, train


@pytest.mark.slow
def test_a_profile_adds_up_and_changes_nothing(store, tmp_path):
    options = {"ranks": 2, "train__updates": 12, "run__sample_every": 8, "run__sample_tokens": 3}
    train(tmp_path / "plain", store, **options)
    run = tmp_path / "run"
    job = train(run, store, **options, run__profile=True)
    assert metrics(run) == metrics(tmp_path / "plain")
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[-2])
    assert line["mfu"] > 0 and line["memory_gib"] > 0

    table = json.loads((run / "profile" / "table.json").read_text())
    rows = {name: row["seconds"] for name, row in table["rows"].items()}
    assert {"set-up", "data", "forward", "backward", "optimizer", "communication", "waits for other ranks"} < set(rows)
    assert {"evaluation", "samples", "checkpoint", "logging", "windows that were traced", "other"} < set(rows)
    assert min(rows.values()) >= 0
    assert sum(rows.values()) == pytest.approx(table["wall"], rel=1e-3)
    assert table["windows"] == 12
    # DeepSpeed's exchange of gradients, and our message of each update.
    assert table["collectives"]["all_reduce"]["calls"] >= 12
    assert "where the time went" in job.text(0) and "by the clock" in job.text(0)
    assert "where the time went" not in job.text(1)

    with gzip.open(run / "profile" / "trace.json.gz") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"forward", "backward", "optimizer", "data", "aten::addmm"} <= names
