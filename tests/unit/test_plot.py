"""Runs are drawn side by side."""

from __future__ import annotations

import json
from pathlib import Path


def test_plot_draws_runs_side_by_side(tmp_path: Path):
    from gptb_ds.cli import main

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        lines = [{"update": n, "tokens": n * 10, "loss": 3.0 / n} for n in range(1, 6)]
        lines.append({"update": 5, "eval_loss": 1.0, "eval_bits_per_byte": 1.4})
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "loss.png"
    assert main(["plot", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    assert main(["plot", str(tmp_path), "--out", str(out)]) == 2
    assert main(["plot", str(tmp_path / "a"), "--out", str(tmp_path / "x.nonsense")]) == 2
