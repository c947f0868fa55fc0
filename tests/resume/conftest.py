"""What the tests of resuming share: a run that was never stopped, which they copy."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness.once import made_once
from tests.harness.training import train


@pytest.fixture(scope="session")
def straight(store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, "straight", lambda at: train(at / "run", store, ranks=2)) / "run"
