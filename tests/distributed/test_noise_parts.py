"""The parts' gradient norms, from which the noise scale is measured, are those of single backward passes."""

from __future__ import annotations

import pytest
import torch

from gptb_ds.config import OptimConfig
from gptb_ds.distributed.world import World
from gptb_ds.model.objective import WindowObjective
from tests.distributed.test_gradients import LANES, STEPS, build, columns
from tests.harness.processes import run_ranks


def measure(world: World, stage: int, precision: str, groups: int) -> list[tuple[float, float, int]]:
    from gptb_ds.training.engine import Engine

    engine = Engine(
        WindowObjective(build()),
        world,
        lanes=LANES // world.size,
        lane_groups=groups,
        precision=precision,
        optim=OptimConfig(clip=0.01),
        policy={"zero_optimization": {"stage": stage, "overlap_comm": False}},
        measure_noise=True,
    )
    size, start = LANES // world.size // groups, world.rank * LANES // world.size
    found = []
    # A rate of 0, so that the second update has the same weights and another window.
    for update in range(2):
        parts = [columns(update, start + g * size, start + (g + 1) * size, False) for g in range(groups)]
        states = [torch.zeros((size, 4, 12), dtype=engine.dtype) for _ in range(groups)]
        result, _ = engine.update(list(zip(parts, states, strict=True)), 0.0, LANES * STEPS)
        found.append((result.part_norm, result.grad_norm, result.parts))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_norms_of_parts_equal_those_of_one_process(stage, precision):
    model = build()
    objective, parameters = WindowObjective(model), list(model.parameters())
    found = run_ranks(measure, 2, stage, precision, 2)
    assert found[0] == found[1], "all ranks know the same"
    for update, (part_norm, _, parts) in enumerate(found[0]):
        squared = []
        for first in range(0, LANES, 2):
            window = columns(update, first, first + 2, False)
            loss, _ = objective(window.input_ids, window.targets, window.reset, torch.zeros((2, 4, 12)))
            gradients = torch.autograd.grad(loss / window.targets.numel(), parameters)
            squared.append(sum(g.square().sum().item() for g in gradients))
        assert parts == len(squared) == 4
        assert part_norm == pytest.approx(sum(squared) / 4, rel=1e-4 if precision == "fp32" else 5e-2)
