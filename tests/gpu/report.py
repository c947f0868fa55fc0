"""Runs all parts on a GPU, prints a table and writes the report: `python -m tests.gpu.report [REPORT.json]`."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.gpu import choices, numerics, speed, trained, training
from tests.gpu.common import GPU, STARTED, show

# Graphs come last: a capture that breaks off leaves the process unfit for more.
SECTIONS = [
    numerics.agreement,
    training.no_waits,
    numerics.repeats,
    training.engine,
    training.traffic,
    training.resume,
    speed.memory,
    numerics.attention,
    speed.speed,
    choices.choices,
    choices.row_sums,
    speed.generation,
    numerics.long_windows,
    trained.kernels,
    speed.graph,
    trained.captured,
    trained.trained_speed,
    trained.compiled_speed,
    trained.trainer,
]


def main(path: str = "gpu-report.json", *only: str) -> int:
    """Writes the report at `path` after each part; `only` names parts, the others are left out."""
    report: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(GPU),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    os.environ.setdefault("DS_ACCELERATOR", "cuda")
    show("machine", report)
    sections = [section for section in SECTIONS if not only or section.__name__ in only]
    failed = []
    for section in sections:
        name, started = section.__name__, time.monotonic()
        try:
            found = section()
        except ImportError as missing:
            found = {"skipped": str(missing)}
        except Exception:
            failed.append(name)
            found = {"failed": traceback.format_exc()}
        torch.cuda.empty_cache()
        report[name] = found | {"seconds": time.monotonic() - started}
        show(name, report[name])
        Path(path).write_text(json.dumps(report, indent=1))
    report["seconds"] = time.monotonic() - STARTED
    Path(path).write_text(json.dumps(report, indent=1))
    passed = len(sections) - len(failed)
    print(f"{passed} of {len(sections)} parts passed in {report['seconds']:.0f} s; {path} written")
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
