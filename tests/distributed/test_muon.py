"""Muon is right under ZeRO: losses, norms, weights and moments of every stage against one plain process.

Axes: B lanes, K steps, S slots, E embedding.
"""

from __future__ import annotations

import pytest
import torch

from gptb_ds.config import OptimConfig
from gptb_ds.distributed.world import World
from gptb_ds.model.objective import WindowObjective
from tests.distributed.test_gradients import LANES, build, columns
from tests.harness.processes import run_ranks

UPDATES = 3
OPTIM = OptimConfig(name="muon", lr=2e-2, weight_decay=0.1, clip=0.5, momentum=0.9, beta1=0.8, beta2=0.9, eps=1e-6)


def quintic(matrix: torch.Tensor) -> torch.Tensor:
    """Muon's orthogonalisation, written out on the singular values."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    s = s / s.square().sum().sqrt()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ vh


def one_process() -> tuple[list[float], list[float], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Plain PyTorch: losses, gradient norms, final weights, and Muon's momenta."""
    model = build().double()
    parameters = dict(model.named_parameters())
    taken = {n: p for n, p in parameters.items() if ".h." in n and p.ndim == 2}
    plain = [p for n, p in parameters.items() if n not in taken and n.endswith("wte.weight")]
    others = [p for n, p in parameters.items() if n not in taken and not n.endswith("wte.weight")]
    adamw = torch.optim.AdamW(
        [{"params": plain, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=OPTIM.lr,
        betas=(OPTIM.beta1, OPTIM.beta2),
        eps=OPTIM.eps,
    )
    momenta = {name: torch.zeros_like(p) for name, p in taken.items()}
    objective, state = WindowObjective(model), torch.zeros((LANES, 4, 12), dtype=torch.float64)
    losses, norms = [], []
    for update in range(UPDATES):
        window = columns(update, 0, LANES, False)
        total, state = objective(window.input_ids, window.targets, window.reset, state)
        loss = total / window.input_ids.numel()
        model.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM.clip)))
        adamw.step()
        with torch.no_grad():
            for name, p in taken.items():
                momenta[name] = OPTIM.momentum * momenta[name] + (1 - OPTIM.momentum) * p.grad
                direction = (1 - OPTIM.momentum) * p.grad + OPTIM.momentum * momenta[name]
                maps = direction.split(12, dim=1) if name.endswith("c_attn.weight") else [direction]
                step = torch.cat([0.2 * max(m.shape) ** 0.5 * quintic(m) for m in maps], dim=1)
                p -= OPTIM.lr * (step + OPTIM.weight_decay * p)
        losses.append(loss.item())
    return losses, norms, {name: p.detach().float() for name, p in parameters.items()}, momenta


def train(world: World, stage: int, precision: str, groups: int):
    from gptb_ds.training.engine import Engine

    engine = Engine(
        WindowObjective(build()),
        world,
        lanes=LANES // world.size,
        lane_groups=groups,
        precision=precision,
        optim=OPTIM,
        policy={"zero_optimization": {"stage": stage, "overlap_comm": False}},
    )
    size, start = LANES // world.size // groups, world.rank * LANES // world.size
    states = [torch.zeros((size, 4, 12), dtype=engine.dtype) for _ in range(groups)]
    losses, norms = [], []
    for update in range(UPDATES):
        parts = [columns(update, start + g * size, start + (g + 1) * size, False) for g in range(groups)]
        counted = LANES * parts[0].input_ids.shape[0]
        result, states = engine.update(list(zip(parts, states, strict=True)), OPTIM.lr, counted)
        assert result.applied
        losses.append(result.loss)
        norms.append(result.grad_norm)
    return losses, norms, engine.fp32_state.export(lambda name: True)


@pytest.fixture(scope="module")
def expected():
    return one_process()


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("ranks", "groups"), [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_every_stage_equals_one_process(expected, stage, ranks, groups):
    want_losses, want_norms, want_weights, want_momenta = expected
    for losses, norms, state in run_ranks(train, ranks, stage, "fp32", groups):
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(want_losses), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(torch.tensor(norms), torch.tensor(want_norms), rtol=1e-4, atol=1e-6)
        assert state["momentum_buffer"].keys() == want_momenta.keys()
        assert state["exp_avg"].keys() == want_weights.keys() - want_momenta.keys() == state["exp_avg_sq"].keys()
        for name, momentum in want_momenta.items():
            found = state["momentum_buffer"][name]
            torch.testing.assert_close(found, momentum.float(), rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
        for name, weight in want_weights.items():
            found = state["weight"][name]
            torch.testing.assert_close(found, weight, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16_is_close_to_one_process(expected, stage):
    want_losses, want_norms, *_ = expected
    losses, norms, _ = run_ranks(train, 2, stage, "bf16", 1)[0]
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(want_losses), rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(torch.tensor(norms), torch.tensor(want_norms), rtol=5e-2, atol=5e-2)
