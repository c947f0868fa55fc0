"""What the tests of resuming share: a run that was never stopped, which they copy."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness.training import train


@pytest.fixture(scope="session")
def straight(store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "straight"
    train(run, store, ranks=2)
    return run
