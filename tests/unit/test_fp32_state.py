"""The optimizer that guards itself, and what is said when DeepSpeed is another inside than we need it."""

from __future__ import annotations

import math
from types import FunctionType
from typing import Any

import pytest
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import nn

from gptb_ds.config import OptimConfig
from gptb_ds.distributed.world import World
from gptb_ds.model.configuration import GPTBConfig
from gptb_ds.model.modeling import GPTBLMHeadModel
from gptb_ds.model.objective import WindowObjective
from gptb_ds.training.engine import Engine
from gptb_ds.training.fp32_state import DeepSpeedChangedError
from gptb_ds.training.optimizers import GuardedAdamW
from tests.harness.processes import run_ranks


def test_an_update_that_is_not_finite_leaves_everything_as_it_was():
    weight = nn.Parameter(torch.ones(3))
    optimizer = GuardedAdamW([{"params": [weight]}], clip=1.0, lr=0.1)
    weight.grad = torch.tensor([1.0, math.inf, 0.0])
    optimizer.step()
    assert optimizer.overflow and optimizer._global_grad_norm == math.inf
    assert torch.equal(weight.detach(), torch.ones(3)) and not optimizer.state[weight]
    weight.grad = torch.tensor([3.0, 4.0, 0.0])
    optimizer.step()
    assert not optimizer.overflow and optimizer._global_grad_norm == 5.0
    torch.testing.assert_close(weight.grad, torch.tensor([0.6, 0.8, 0.0]))
    assert optimizer.state[weight]["step"] == 1


def build_engine(world: World, stage: int, precision: str) -> Engine:
    config = GPTBConfig(vocab_size=31, n_positions=4, num_slots=4, n_layer=1, n_head=2, n_embd=8)
    return Engine(
        WindowObjective(GPTBLMHeadModel(config)),
        world,
        lanes=2,
        lane_groups=1,
        precision=precision,
        optim=OptimConfig(),
        policy={"zero_optimization": {"stage": stage, "overlap_comm": False}},
    )


def _without(name: str, kind: type) -> None:
    """DeepSpeed's class as if the attribute had another name."""
    built = kind.__init__

    def init(self: Any, *args: Any, **options: Any) -> None:
        built(self, *args, **options)
        if name in vars(self):
            vars(self)["renamed"] = vars(self).pop(name)

    kind.__init__ = init  # type: ignore[misc]
    if name in vars(kind):
        delattr(kind, name)


def _refusals(world: World) -> dict[str, str]:
    """What is said when each of the internals is gone."""
    said = {}
    for stage, precision, kind, name in (
        (0, "bf16", FP16_UnfusedOptimizer, "fp32_groups"),
        (1, "fp32", DeepSpeedZeroOptimizer, "_hp_optimizer_states_linked"),
        (2, "fp32", DeepSpeedZeroOptimizer, "single_partition_of_fp32_groups"),
        (1, "bf16", DeepSpeedZeroOptimizer, "_lazy_init_hp_params_optimizer_state"),
        (3, "fp32", DeepSpeedZeroOptimizer_Stage3, "fp32_partitioned_groups_flat"),
    ):
        before, method = kind.__init__, vars(kind).get(name)
        _without(name, kind)
        try:
            build_engine(world, stage, precision)
        except DeepSpeedChangedError as error:
            said[name] = str(error)
        kind.__init__ = before
        if isinstance(method, FunctionType):
            setattr(kind, name, method)
    step = DeepSpeedEngine._take_model_step
    DeepSpeedEngine._take_model_step = lambda self: self.optimizer.step()
    try:
        build_engine(world, 0, "fp32")
    except DeepSpeedChangedError as error:
        said["_global_grad_norm"] = str(error)
    DeepSpeedEngine._take_model_step = step
    for stage in range(4):
        build_engine(world, stage, "fp32")  # all is well again
    return said


@pytest.mark.slow
def test_an_internal_that_was_renamed_is_named_in_one_line():
    (said,) = run_ranks(_refusals, 1)
    assert len(said) == 6
    for name, text in said.items():
        assert f"'{name}'" in text and "in 0.19.8:" in text and "install deepspeed>=0.19.8,<0.20" in text
        assert "\n" not in text


def _dropout_after_an_error(world: World) -> tuple[bool, bool, bool]:
    engine = build_engine(world, 0, "fp32")
    with pytest.raises(ZeroDivisionError), engine.evaluating():
        inside = engine.model.training or torch.is_grad_enabled()
        raise ZeroDivisionError
    return inside, engine.model.training, torch.is_grad_enabled()


@pytest.mark.slow
def test_training_goes_on_after_an_evaluation_that_failed():
    assert run_ranks(_dropout_after_an_error, 1) == [(False, True, True)]
