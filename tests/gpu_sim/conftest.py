"""The make-believe device, built once for all tests of this folder and for later runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TORCH = "2.13."
# Runs `python -m MODULE ARGUMENTS...` with further variables of the environment.
Start = Callable[..., subprocess.Popen]


def missing() -> str | None:
    if not version("torch").startswith(TORCH):
        return f"torch {TORCH}x, whose private interfaces the device uses (here: {version('torch')})"
    programs = [name for name in ("g++", "ninja") if shutil.which(name, path=_path()) is None]
    return f"missing: {', '.join(programs)} (Debian packages: g++ ninja-build)" if programs else None


def _path() -> str:
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def start(module: str, *args: str, **variables: str) -> subprocess.Popen:
    environment = os.environ | {"PATH": _path(), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | variables
    command = [sys.executable, "-m", module, *args]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture(scope="session")
def device() -> Start:
    """What starts a program on the device. Building it takes 90 s, once for each version of torch."""
    reason = missing()
    if reason:
        if os.environ.get("GPTB_DS_REQUIRE_ALL") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    # The first process only builds: CUDA's hooks must be there before torch is imported.
    build = start("tests.gpu_sim.fake_cuda")
    _, errors = build.communicate(timeout=900)
    assert build.returncode == 0, errors
    return start
