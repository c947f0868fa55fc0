"""A build of an extension that was killed holds nobody up, and one that is under way is waited for."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from gptb_ds import extension_builds
from gptb_ds.doctor import examine
from gptb_ds.extension_builds import CPU_ADAM, abandoned, build_folder, built
from tests.harness.processes import wait_until

# A build through torch with a source so small that it takes a second, and no headers of torch.
BUILD = """
import sys
from pathlib import Path
from torch.utils.cpp_extension import load
folder = Path(sys.argv[1])
load(folder.name, [str(folder / "source.cpp")], build_directory=str(folder), is_python_module=False)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    made = build_folder(CPU_ADAM)
    assert made == tmp_path / "extensions" / CPU_ADAM
    (made / "source.cpp").write_text('extern "C" int answer() { return 42; }\n')
    return made


def begin_build(folder: Path, compiler: str | None = None) -> subprocess.Popen[bytes]:
    """A process of torch's that builds there, in a session of its own. `compiler` takes the place of the real one."""
    environment = os.environ | ({"CXX": compiler} if compiler else {})
    return subprocess.Popen([sys.executable, "-c", BUILD, str(folder)], env=environment, start_new_session=True)


def begin_endless_build(folder: Path) -> subprocess.Popen[bytes]:
    """One that has taken the lock, and whose compiler does not come back as long as this test lives."""
    compiler = folder.parent / "endless-compiler"
    # Asked for its version it answers, as torch wants to know.
    answer = 'case "$*" in *-v*|*-dump*) exec c++ "$@";; esac'
    compiler.write_text(f"#!/bin/sh\n{answer}\nwhile kill -0 {os.getpid()}; do sleep 1; done\n")
    compiler.chmod(0o755)
    process = begin_build(folder, str(compiler))
    wait_until((folder / "lock").exists, "the lock of a build")
    return process


def kill(process: subprocess.Popen[bytes]) -> None:
    compilers = psutil.Process(process.pid).children(recursive=True)  # ninja gives each a process group of its own
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for compiler in compilers:
        with contextlib.suppress(psutil.NoSuchProcess):
            compiler.kill()


def build_here(folder: Path) -> int:
    process = begin_build(folder)
    return process.wait()


def said_by_doctor() -> str:
    return next(finding.text for finding in examine([], None) if finding.name == "extensions")


@pytest.mark.slow
def test_the_lock_of_a_killed_build_is_removed_and_one_in_use_is_not(folder: Path):
    assert "not built yet" in said_by_doctor()
    first, said = begin_endless_build(folder), []
    try:
        assert not abandoned(folder / "lock")
        assert "a build is under way" in said_by_doctor()
        # The second comes while the first is at work, and waits.
        done: list[int] = []
        second = threading.Thread(target=lambda: done.append(built(CPU_ADAM, lambda: build_here(folder), said.append)))
        second.start()
        wait_until(lambda: said, "word of the build that waits")
        assert said == [f"waiting for another program's build in {folder} (if there is none: remove {folder}/lock)"]
    finally:
        kill(first)
    second.join()
    assert done == [0]
    assert said[1:] == [
        f"removing {folder}/lock, which a build that was killed has left behind",
        f"building DeepSpeed's {CPU_ADAM} in {folder}, once: one to two minutes",
    ]
    assert not (folder / "lock").exists() and any(folder.glob("*.so"))
    assert said_by_doctor() == f"{folder}: built"


@pytest.mark.slow
def test_on_files_that_hosts_share_a_lock_is_left_alone_while_anything_changes(folder: Path, monkeypatch):
    monkeypatch.setattr(extension_builds, "_LOCAL", set())
    kill(begin_endless_build(folder))
    lock = folder / "lock"
    assert not abandoned(lock), "a builder may be at work on another host"
    for file in folder.iterdir():
        os.utime(file, (1_000_000_000, 1_000_000_000))
    assert abandoned(lock)
    assert "left from a build that was killed" in said_by_doctor()


def test_what_cannot_be_built_is_one_line_with_its_reason(folder: Path):
    def fails() -> None:
        raise RuntimeError("Error building extension 'cpu_adam': [1/2] c++ ...\nsource.cpp:1:1: error: no such thing\n")

    with pytest.raises(ValueError, match=r"cpu_adam.*can't be built here: source.cpp:1:1: error: no such thing; see"):
        built(CPU_ADAM, fails, print)
    assert built(CPU_ADAM, lambda: 7, print) == 7, "nobody holds the turn any more"
