"""What the experiments on backbones print is what they found, and a family is tried as a run would build it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "launch" / "experiments"


@pytest.fixture
def experiment(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))

    def load(name: str) -> Any:
        monkeypatch.delitem(sys.modules, name, raising=False)
        return __import__(name)

    return load


def test_the_table_shows_the_newest_line_of_each_backbone(experiment: Any) -> None:
    line = {"backbone": "llama", "wanted": 8, "updates": 4, "parameters": 1234, "tokens_per_second": 99.6}
    stopped = line | {"evaluations": [[0, 3.5], [4, 3.0]]}
    done = line | {"updates": 8, "evaluations": [[0, 3.5], [4, 3.0], [8, 2.25]]}
    other = done | {"wanted": 9}
    assert experiment("backbones").table([stopped, done, other], 8).splitlines()[2:] == [
        "| llama | 1,234 | 3.50 | 3.00 | 2.25 |"
    ]


@pytest.mark.parametrize(("family", "reason"), [("llama", None), ("bert", "an encoder"), ("mixtral", "experts")])
def test_a_family_fits_or_has_a_reason(experiment: Any, family: str, reason: str | None) -> None:
    found = experiment("families").tried(family)
    assert found["family"] == family and found["fits"] is (reason is None)
    assert (reason or "None") in str(found["reason"])
