"""The model of what ranks exchange predicts the calls and bytes that are counted, at every stage.

Axes: K steps of a window.
"""

from __future__ import annotations

import pytest
import torch

from gptb_ds.config import OptimConfig
from gptb_ds.data.window import Window
from gptb_ds.distributed.collectives import CollectiveMeter
from gptb_ds.distributed.world import World
from gptb_ds.model.objective import WindowObjective
from gptb_ds.training.deepspeed_policy import with_defaults
from gptb_ds.training.exchange import ETHERNET, NVLINK, exchange_seconds, exchanges, sent_bytes, tokens_for_share
from tests.harness.models import V, small_gptb
from tests.harness.processes import run_ranks

LANES = 4
# (stage, precision, lane groups, K)
CASES = [(stage, precision, groups, 3) for stage in range(4) for precision in ("fp32", "bf16") for groups in (1, 2)]
CASES += [(stage, "fp32", 1, 9) for stage in range(4)]
_KINDS = {"all_gather_into_tensor": "all_gather", "reduce_scatter_tensor": "reduce_scatter"}


def counted(world: World) -> list[dict[str, tuple[int, int]]]:
    """(calls, bytes) by kind of each case's third update; ahead of them, of the model: (parameters, tensors).

    In the first two, ranks at stage 3 also tell one another in which order they gather.
    """
    from gptb_ds.training.engine import Engine  # it loads DeepSpeed

    meter = CollectiveMeter(world).install()  # once, before DeepSpeed keeps a function
    shape = [p.numel() for p in small_gptb().parameters()]
    found = [{"model": (sum(shape), len(shape))}]
    for stage, precision, groups, steps in CASES:
        torch.manual_seed(5)
        options = {"lane_groups": groups, "precision": precision, "optim": OptimConfig(), "graph": "off"}
        buckets = {"reduce_bucket_size": 1_000_000} if stage else {}
        policy = with_defaults({"zero_optimization": {"stage": stage} | buckets})
        engine = Engine(WindowObjective(small_gptb().train()), world, lanes=LANES, policy=policy, **options)
        states = [engine.model.empty_state(LANES // groups) for _ in range(groups)]
        for _ in range(3):
            ids = torch.randint(V, (steps, LANES))
            parts = Window(ids, ids, torch.zeros_like(ids, dtype=torch.bool), None).split_lanes(groups)
            meter.tallies.clear()
            _, states = engine.update(list(zip(parts, states, strict=True)), 1e-3, steps * LANES * world.size)
        found.append({_KINDS.get(name, name): (t.calls, t.bytes) for name, t in meter.tallies.items()})
    meter.remove()
    return found


@pytest.mark.slow
def test_calls_and_bytes_are_those_that_the_model_predicts():
    first, second = run_ranks(counted, 2)
    assert first == second, "every rank takes part in all"
    model, *updates = first
    parameters, tensors = model["model"]
    for (stage, precision, groups, steps), update in zip(CASES, updates, strict=True):
        value_bytes = 2 if precision == "bf16" else 4
        predicted = exchanges(
            parameters, stage=stage, value_bytes=value_bytes, lane_groups=groups, tensors=tensors, numbers=3
        )
        calls, size = dict.fromkeys(update, 0), dict.fromkeys(update, 0)
        for one in predicted:
            calls[one.kind] += one.calls
            size[one.kind] += one.bytes
        case = (stage, precision, groups, steps)
        assert {kind: found for kind, (found, _) in update.items()} == calls, case
        # DeepSpeed pads what it gathers, and its norm has four bytes or eight.
        assert {kind: found for kind, (_, found) in update.items()} == pytest.approx(size, rel=0.01, abs=16), case


def test_the_share_of_the_exchange_falls_with_the_tokens_of_an_update():
    found = exchanges(124_000_000, stage=1, value_bytes=2)
    assert sent_bytes(found, 1) == 0
    # A scatter of sums and two gathers, each of all but a rank's own part.
    assert sent_bytes(found, 8) == pytest.approx(3 * 7 / 8 * 248e6, rel=1e-3)
    assert exchange_seconds(found, 64, ETHERNET) > exchange_seconds(found, 64, NVLINK) > 0
    tokens = tokens_for_share(found, 64, NVLINK, tokens_per_second=25_000)
    seconds = exchange_seconds(found, 64, NVLINK)
    assert seconds / (seconds + tokens / 25_000) == pytest.approx(0.05)
