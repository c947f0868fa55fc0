"""Other backbones on a device that is not the CPU: a window neither waits nor copies, so that a graph can hold it."""

from __future__ import annotations

import json

import pytest

from tests.harness.backbones import FAMILIES

from .conftest import Start

WINDOWS = [f"window:bf16:2:1@{family}" for family in FAMILIES]
GRAPHS = ["1:fp32:2:2:graph@llama", "0:fp32:0:1:graph@gemma2", "1:bf16:0:1:graph@gpt_neox"]


@pytest.fixture(scope="module")
def results(device: Start) -> dict[str, dict]:
    plain = [case.replace(":graph", "") for case in GRAPHS]
    process = device("tests.gpu_sim.engine_cases", *WINDOWS, *GRAPHS, *plain)
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    found = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return {line["case"]: line for line in found}


@pytest.mark.slow
@pytest.mark.parametrize("case", WINDOWS)
def test_nothing_in_a_window_waits_or_is_copied(results, case):
    assert "error" not in results[case], results[case]["error"]
    assert results[case]["launches"] > 100
    assert results[case]["waits"] == {} and results[case]["copies"] == {}


@pytest.mark.slow
@pytest.mark.parametrize("case", GRAPHS)
def test_captured_windows_train_as_plain_ones(results, case):
    found, plain = results[case], results[case.replace(":graph", "")]
    assert "error" not in found, found["error"]
    assert found["replays"] > 0 == plain["replays"]
    assert found["losses"] == plain["losses"] and found["weights"] == plain["weights"]
