"""Updates on a device that is not the CPU: nothing is on the wrong one, and the host waits only where it must.

Axes: K steps of a window.
"""

from __future__ import annotations

import json

import pytest

from .conftest import Start

PLAIN = [f"{stage}:{precision}:0:1" for stage in (0, 1, 2, 3) for precision in ("fp32", "bf16")]
# DeepSpeed scales no loss at stage 0 in fp16, which is refused.
ALL = [
    f"{stage}:{precision}:{recompute}:{groups}"
    for stage in (0, 1, 2, 3)
    for precision in ("fp32", "bf16", "fp16")
    for recompute in (0, 2)
    for groups in (1, 2)
    if (stage, precision) != (0, "fp16")
]
ALL += ["1:bf16:cheap:2", "3:fp32:cheap:1"]
# Some of them, for what need not be asked of each.
OTHERS = ["0:fp32:0:2", "0:bf16:2:2", "1:fp32:2:2", "2:bf16:2:2", "3:bf16:2:2", "3:fp32:0:2"]
OFFLOADED = ["1:fp32:0:2:offload", "1:bf16:0:1:offload", "2:fp32:2:2:offload", "2:bf16:0:2:offload"]
OFFLOADED += ["3:fp32:0:1:offload", "3:bf16:2:2:offload", "3:fp32:2:2:offload-all", "3:bf16:2:2:offload-all"]
WINDOWS = [f"window:{precision}:{recompute}:1" for precision in ("fp32", "bf16") for recompute in (0, 2, "cheap")]
SAMPLES = ["sample:fp32:0:4", "sample:fp32:0:20", "sample:bf16:0:20"]
KEPT = ["kept:fp32:0:4", "kept:bf16:0:4", "kept:bf16:0:16"]
# Each beside the same case without graphs.
GRAPHS = ["0:fp32:0:1", "0:fp32:0:2", "0:bf16:2:2", "1:fp32:2:2", "1:bf16:0:1", "1:fp16:0:1", "2:bf16:2:2"]
GRAPHS += ["1:bf16:cheap:2"]
# Those whose last update is made once more.
AGAIN = PLAIN + OTHERS + [f"{case}:graph" for case in GRAPHS]


@pytest.fixture(scope="module")
def results(device: Start) -> dict[str, dict]:
    cases = ALL + OFFLOADED + WINDOWS + SAMPLES + KEPT + [f"{case}:graph" for case in [*GRAPHS, "3:bf16:2:2"]]
    # DeepSpeed's CPU Adam is built by the first of these on a machine: a minute or two.
    process = device("tests.gpu_sim.engine_cases", *(f"{case}!" if case in AGAIN else case for case in cases))
    output, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors
    found = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return {line["case"]: line for line in found}


@pytest.mark.slow
@pytest.mark.parametrize("case", ALL + OFFLOADED)
def test_an_update_stays_on_the_device(results, case):
    found = results[case]
    assert "error" not in found, found["error"]
    # fp16 begins with a loss scale that is too large, on purpose.
    assert all(found["applied"]) or "fp16" in case
    reference = results["1:fp32:0:1"]["losses"]
    tolerance = {"fp32": 1e-4, "bf16": 3e-2, "fp16": 3e-2}[case.split(":")[1]]
    assert found["losses"] == pytest.approx(reference, rel=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("case", WINDOWS)
def test_nothing_in_a_window_waits_or_is_copied(results, case):
    """Forward and backward of a window: what a CUDA graph could hold."""
    assert "error" not in results[case], results[case]["error"]
    assert results[case]["launches"] > 100
    assert results[case]["waits"] == {}
    assert results[case]["copies"] == {}


@pytest.mark.slow
@pytest.mark.parametrize("case", AGAIN)
def test_a_snapshot_of_the_device_is_gone_back_to(results, case):
    """The update after it is the same when it is made once more; in bf16 and fp16 but for what is said below."""
    first, again = results[case]["twice"]
    assert first["weights"] != results[case]["weights"] or "fp16" in case
    assert again["loss"] == pytest.approx(first["loss"], rel=1e-4)
    if "fp32" in case:
        assert again == first


# Host waits of an update. Ours is one, for the loss that all ranks share and the gradient norm; at stage 0 in fp32 our
# optimizer asks for the norm before. The others are DeepSpeed's, once an update or parameter group (there are two), not
# once a parameter. At stage 0 in bf16: a norm of each group, read twice and sent back to the device. At stages 1 and 2:
# for each group a constant that is sent, read where the norm is masked with it (`mask_nan_or_inf_with_val_inplace`),
# and whether the norm is valid; that once more for both; in bf16 whether a gradient overflowed. At stage 3: for each
# group the constant; whether the norm is valid; and two streams, one a bucket of gradients.
WAITS = {
    "0:fp32": 2, "0:bf16": 7, "1:fp32": 8, "1:bf16": 9, "2:fp32": 8, "2:bf16": 9, "3:fp32": 6, "3:bf16": 6,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", PLAIN)
def test_an_update_waits_for_the_device_a_fixed_number_of_times(results, case):
    assert sum(results[case]["waits"].values()) <= WAITS[case[:6]], results[case]["waits"]


PARAMETERS = 29  # of the small model: 12 a block, its two tables, the initial state, the last norm


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in OFFLOADED if case[0] in "12"])
def test_with_offload_the_host_waits_twice_for_each_parameter(results, case):
    """DeepSpeed's (0.19.8), whose `complete_grad_norm_calculation_for_cpu_offload` reads the norms one by one.

    Two reads a parameter at stages 1 and 2; at stage 2 also an event for each, in each lane group. None of ours, and
    nothing that grows with lanes or columns.
    """
    stage, precision, _, groups, _ = case.split(":")
    around = 6 if precision == "fp32" else 8  # an update, of which bf16 has its check of overflow
    most = 2 * PARAMETERS + around + (PARAMETERS * int(groups) if stage == "2" else 0)
    assert sum(results[case]["waits"].values()) <= most, results[case]["waits"]


@pytest.mark.slow
@pytest.mark.parametrize("case", GRAPHS)
def test_captured_windows_train_as_plain_ones(results, case):
    """With gradients of several lane groups added up, DeepSpeed's hooks, recomputation and a loss scale.

    Bit for bit in fp32. In bf16 and fp16 a CPU's products depend on where in memory their factors begin, also without
    graphs: the same case, later in the same process, differs in the fifth digit of its third loss.
    """
    found, plain = results[f"{case}:graph"], results[case]
    assert "error" not in found, found["error"]
    # A forward and a backward graph for each lane group of the last update.
    assert found["replays"] == 2 * int(case.split(":")[3])
    assert plain["replays"] == 0
    if "fp32" in case:
        assert found["losses"] == plain["losses"]
        assert found["weights"] == plain["weights"]
    assert found["losses"] == pytest.approx(plain["losses"], rel=1e-4)


@pytest.mark.slow
def test_where_windows_cannot_be_captured_training_goes_on(results):
    found = results["3:bf16:2:2:graph"]
    assert "error" not in found, found["error"]
    assert found["replays"] == 0
    assert found["losses"] == pytest.approx(results["3:bf16:2:2"]["losses"], rel=1e-4)


# Copies of an update between device and host, (there, back), and for each lane group beyond the first. Each is one of
# few numbers: what the host reads, as above, DeepSpeed's constants, and two for each collective, which go over the host
# on this device alone. None is for a parameter, a column or a lane.
COPIES = {
    "0:fp32": ((1, 2), 0), "0:bf16": ((3, 2), 0), "1:fp32": ((5, 4), 0), "1:bf16": ((6, 5), 0), "1:fp16": ((6, 5), 0),
    "2:fp32": ((5, 4), 1), "2:bf16": ((6, 5), 1), "2:fp16": ((6, 5), 1),
    "3:fp32": ((6, 5), 2), "3:bf16": ((6, 5), 2), "3:fp16": ((7, 6), 2),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", ALL)
def test_an_update_copies_a_fixed_number_of_times(results, case):
    (there, back), more = COPIES[case[:6]]
    further = more * (int(case.split(":")[3]) - 1)
    copies = results[case]["copies"]
    assert copies["to device"] <= there + further and copies["to host"] <= back + further, copies


@pytest.mark.slow
@pytest.mark.parametrize("case", SAMPLES)
def test_a_sample_waits_once_however_long_it_is(results, case):
    found = results[case]
    assert "error" not in found, found["error"]
    assert found["drawn"] > 0
    assert sum(found["waits"].values()) == 1
    assert found["copies"] == {"to host": 1}


@pytest.mark.slow
@pytest.mark.parametrize("case", KEPT)
def test_what_is_kept_for_backward_is_what_the_formula_says(results, case):
    found = results[case]
    assert "error" not in found, found["error"]
    assert found["kept"] == pytest.approx(found["formula"], rel=0.01)
