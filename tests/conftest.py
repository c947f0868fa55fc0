"""The fixtures that several kinds of tests share."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tests.harness.once import made_once
from tests.harness.training import write_corpus

# Models of tests are tiny: a second thread waits for the first longer than it works, above all on a busy machine.
torch.set_num_threads(1)

# The same examples in every run of the same test, so that a failure can be repeated and none comes by chance.
# HYPOTHESIS_PROFILE=search looks for new ones.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("search", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small store of byte-level documents, with a held-out split."""
    from gptb_ds.cli import main

    def make(folder: Path) -> None:
        texts = write_corpus(folder / "texts")
        assert main(["prepare", "--source", str(texts), "--out", str(folder / "store"), "--holdout", "0.2"]) == 0

    return made_once(tmp_path_factory, "data", make) / "store"


@pytest.fixture(autouse=True)
def no_process_left() -> Iterator[None]:
    """Whatever became of a test, its ranks end with it: a stopped one (SIGSTOP) would hold up pytest's own end."""
    yield
    for process in multiprocessing.active_children():
        process.kill()
        process.join(10)
