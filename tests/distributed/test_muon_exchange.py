"""Muon on pieces of matrices that lie on several ranks makes the step of one process."""

from __future__ import annotations

import pytest
import torch

from gptb_ds.distributed.world import World
from gptb_ds.training.muon import Matrix, MuonWithAdamW, Piece
from tests.harness.processes import run_ranks

SHAPES = {"a": (6, 9), "b": (4, 4), "c": (5, 12), "d": (8, 3)}
MATRICES = {"a": Matrix(3, 1), "b": Matrix(1, 1), "c": Matrix(1, 0), "d": Matrix(1, 1)}
STEPS = 3


def values(kind: int) -> torch.Tensor:
    """All parameters' weights (kind 0) or gradients, one after another."""
    size = sum(torch.Size(shape).numel() for shape in SHAPES.values())
    return torch.randn(size, generator=torch.Generator().manual_seed(kind))


def cut(rank: int, bounds: list[int]) -> tuple[slice, list[Piece]]:
    """Rank `rank`'s share [bounds[rank], bounds[rank + 1]) of all parameters laid end to end."""
    first, stop = bounds[rank], bounds[rank + 1]
    pieces, begin = [], 0
    for name, shape in SHAPES.items():
        end = begin + torch.Size(shape).numel()
        low, high = max(first, begin), min(stop, end)
        size = max(0, high - low)
        pieces.append(Piece(name, shape, low - begin if size else 0, low - first if size else 0, size))
        begin = end
    return slice(first, stop), pieces


def steps(world: World, bounds: list[int]) -> torch.Tensor:
    own, pieces = cut(world.rank, bounds)
    flat = torch.nn.Parameter(values(0)[own].clone())
    muon = MuonWithAdamW(
        [{"params": [flat], "muon": True, "weight_decay": 0.1}],
        matrices=MATRICES,
        momentum=0.9,
        device=world.device,
        lr=0.1,
    )
    muon.layout = lambda _: pieces
    for step in range(STEPS):
        flat.grad = values(1 + step)[own].clone()
        muon.step()
    return flat.detach()


@pytest.mark.slow
def test_pieces_on_several_ranks_make_the_step_of_one_process():
    whole = [
        torch.nn.Parameter(part.view(shape)) for part, shape in zip(_split(values(0)), SHAPES.values(), strict=True)
    ]
    names = {id(parameter): name for parameter, name in zip(whole, SHAPES, strict=True)}
    muon = MuonWithAdamW(
        [{"params": whole, "muon": True, "weight_decay": 0.1}],
        matrices=MATRICES,
        momentum=0.9,
        device=torch.device("cpu"),
        lr=0.1,
    )
    muon.layout = lambda p: [Piece(names[id(p)], tuple(p.shape), 0, 0, p.numel())]
    for step in range(STEPS):
        for parameter, gradient in zip(whole, _split(values(1 + step)), strict=True):
            parameter.grad = gradient.view(parameter.shape).clone()
        muon.step()
    want = torch.cat([parameter.detach().flatten() for parameter in whole])
    total = want.numel()
    # Uneven cuts, one of them in the middle of a matrix, and a rank that has nothing of most of them.
    for bounds in ([0, 60, total], [0, total - 3, total], [0, 47, 48, total]):
        found = torch.cat(run_ranks(steps, len(bounds) - 1, bounds))
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)


def _split(flat: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return flat.split([torch.Size(shape).numel() for shape in SHAPES.values()])
