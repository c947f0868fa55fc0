"""The proof of runs on one machine: no launcher, the deepspeed launcher, mpirun; stopping, orphans, going on."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.launched import LAUNCH, PATIENCE, TinyRun, alive, finish, started

from .conftest import require

pytestmark = pytest.mark.slow
ONE_NODE = ["bash", str(LAUNCH / "one_node.sh")]
MPIRUN = ["bash", str(LAUNCH / "mpirun.sh")]
MPI_ENV = {
    "N": "2",
    "MPIRUN_ARGS": "--oversubscribe",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
}


def test_one_process_needs_no_launcher_and_no_mpi(store: Path, plain: TinyRun, tmp_path: Path) -> None:
    """The first updates of one process equal those of two ranks to float tolerance; mpi4py cannot be imported."""
    run = TinyRun(tmp_path, store, updates=20)
    (tmp_path / "mpi4py.py").write_text("raise ImportError('no MPI on this machine')\n")
    log = tmp_path / "log"
    command = [sys.executable, "-m", "gptb_ds", "train", "--optim.schedule", "constant"]
    assert finish(command, run, log, {"PYTHONPATH": str(tmp_path)}) == 0, log.read_text()
    assert run.lines()[0]["loss"] == pytest.approx(plain.lines()[0]["loss"], rel=1e-5)


def test_killed_rank_ends_the_job_with_its_fault(store: Path, tmp_path: Path) -> None:
    run, log = TinyRun(tmp_path, store, updates=100_000), tmp_path / "log"
    with started(ONE_NODE, run, log, {"N": "2"}) as process:
        run.wait_for_update(1, log.read_text)
        ranks = run.ranks()
        ranks[1].kill()
        assert process.wait(PATIENCE) not in (0, 2, 85), log.read_text()
        assert not alive(ranks)


def test_mpirun_saves_on_sigterm_and_goes_on(store: Path, plain: TinyRun, tmp_path: Path) -> None:
    require([] if shutil.which("mpirun") else ["mpirun"], "openmpi-bin")
    run, log = TinyRun(tmp_path, store), tmp_path / "log"
    with started(MPIRUN, run, log, MPI_ENV) as process:
        run.wait_for_update(1, log.read_text)
        ranks = run.ranks()
        assert len(ranks) == 2
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 85, log.read_text()
        assert not alive(ranks)
    assert run.checkpoints() == [run.update()] and run.update() < run.updates
    assert finish(MPIRUN, run, log, MPI_ENV) == 0, log.read_text()
    assert run.lines() == plain.lines()


def test_mistake_is_named_once_and_exits_with_2(store: Path, tmp_path: Path) -> None:
    """Three ranks cannot share eight lanes; every rank finds out, one says so."""
    run, log = TinyRun(tmp_path, store), tmp_path / "log"
    assert finish(ONE_NODE, run, log, {"N": "3"}) == 2, log.read_text()
    assert log.read_text().count("data.lanes 8 cannot be shared by 3 ranks") == 1
    assert "Traceback" not in log.read_text()


def test_scripts_are_shellcheck_clean() -> None:
    require([] if shutil.which("shellcheck") else ["shellcheck"], "shellcheck")
    scripts = sorted(map(str, [*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")]))
    done = subprocess.run(["shellcheck", "-x", *scripts], cwd=LAUNCH.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
