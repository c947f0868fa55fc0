"""A process that goes on without an engine gets its memory back."""

from __future__ import annotations

import gc
import weakref

import pytest

from gptb_ds.distributed.world import World
from tests.harness.processes import run_ranks
from tests.unit.test_fp32_state import build_engine


def _left_of_closed_engines(world: World) -> list[int]:
    left = []
    for stage in range(3):
        engine = build_engine(world, stage, "bf16")
        model = weakref.ref(engine.model)
        engine.close()
        del engine
        gc.collect()
        if model() is not None:
            left.append(stage)
    return left


@pytest.mark.slow
def test_a_closed_engine_frees_its_model_at_stages_0_to_2() -> None:
    assert run_ranks(_left_of_closed_engines, 1) == [[]]
