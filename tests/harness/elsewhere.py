"""A machine without this package: a Python that finds only what torch and transformers need."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

# What is ours, or ours alone of all that is installed here.
_HIDDEN = ("gptb", "__editable__", "deepspeed", "datasets", "pydantic", "mpi4py", "accelerate")
_FIRST = 'import importlib.util as u; assert not u.find_spec("gptb_ds") and not u.find_spec("deepspeed")\n'


def run_elsewhere(program: str, folder: Path, *arguments: object) -> Any:
    """Runs `program` there, in `folder`, and returns the JSON that it prints last."""
    packages = Path(torch.__file__).parents[1]
    site = folder / "site"
    site.mkdir()
    for entry in packages.iterdir():
        if not entry.name.startswith(_HIDDEN) and entry.suffix != ".pth":
            (site / entry.name).symlink_to(entry)
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"PYTHONPATH": str(site), "HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-S", "-c", _FIRST + program, *map(str, arguments)],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])
