"""Random streams of one seed are independent."""

from __future__ import annotations

from gptb_ds.distributed.world import derive_seed


def test_random_streams_are_independent():
    seeds = {derive_seed(seed, name, rank) for seed in range(3) for name in ("dropout", "data") for rank in range(5)}
    assert len(seeds) == 30
    assert derive_seed(1, "dropout", 0) == derive_seed(1, "dropout", 0)
