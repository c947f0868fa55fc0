"""On a resume one rank reads weights and moments from the disk, and all have them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gptb_ds.checkpoint.format import Manifest
from gptb_ds.checkpoint.reader import CheckpointReader
from gptb_ds.checkpoint.writer import CheckpointWriter
from gptb_ds.distributed.world import World
from tests.harness.processes import run_ranks


def read(world: World, folder: Path) -> tuple[list[torch.Tensor], list[tuple[str, str]]]:
    """What a rank has in the end, and what it read itself."""
    reader, own = CheckpointReader(folder), []
    fetch = reader.fetch

    def counted(kind: str, name: str) -> torch.Tensor:
        own.append((kind, name))
        return fetch(kind, name)

    reader.fetch = counted
    kinds = ("weight", "exp_avg", "exp_avg_sq")
    return [reader.fetch_together(world, kind, name) for name in ("a", "b") for kind in kinds], own


@pytest.mark.slow
def test_rank_0_reads_for_all(tmp_path: Path):
    weight = {"a": torch.randn(3, 2), "b": torch.randn(5)}
    parameters = {
        kind: {name: tensor * factor for name, tensor in weight.items()}
        for kind, factor in (("weight", 1), ("exp_avg", 2), ("exp_avg_sq", 3))
    }
    lanes = {"state": torch.zeros(4, 3, 8), "ordinal": torch.arange(4), "offset": torch.arange(4)}
    writer = CheckpointWriter(tmp_path, World(), keep=1)
    writer.begin(Manifest(1, 8, 1.5, 1, 1, 4, 2, {}, {}, {}, {}), parameters, lanes, {"cpu": torch.get_rng_state()})
    first, second = run_ranks(read, 2, writer.finish())
    want = [weight[name] * factor for name in ("a", "b") for factor in (1, 2, 3)]
    for tensors, _ in (first, second):
        assert all(torch.equal(got, tensor) for got, tensor in zip(tensors, want, strict=True))
    assert len(first[1]) == 6 and second[1] == []
