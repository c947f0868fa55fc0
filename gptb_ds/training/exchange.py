"""How much the ranks of a job exchange in an update, as a model: collectives, bytes, and their time on a network.

Weights are exchanged once an update, whatever K is, and however many lanes a rank has: for each token the traffic falls
as 1 / (K x lanes). `tests/distributed/test_exchange.py` holds the model to what is counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log2

# A collective's bytes are those of the tensor that all ranks have before or after it. Of them a rank sends and receives
# this share of (W - 1) / W: an all-reduce is a scatter of sums and a gather.
_PASSES = {"all_reduce": 2.0, "all_gather": 1.0, "reduce_scatter": 1.0}


@dataclass(frozen=True)
class Exchange:
    """Collectives of one kind in an update: `calls` of them, together so many values of so many bytes each."""

    kind: str
    calls: int
    values: int
    value_bytes: int

    @property
    def bytes(self) -> int:
        return self.values * self.value_bytes


def exchanges(
    parameters: int,
    *,
    stage: int,
    value_bytes: int,
    lane_groups: int = 1,
    tensors: int = 1,
    bucket: int = 50_000_000,
    numbers: int = 5,
) -> list[Exchange]:
    """What the ranks exchange in an update under DeepSpeed 0.19 with one of our policies. Padding is left out.

    `parameters` counts weights in `tensors`; `value_bytes` is 2 in bf16 and fp16, 4 in fp32. Gradients are added up in
    buckets, once an update at stages 0 and 1 and once a lane group from stage 2 on, where no rank keeps all of them.
    From stage 1 on the updated weights are gathered: by optimizer group (two), at stage 3 tensor by tensor in a
    window's first step, and kept for the others. `numbers` are ours, in fp64: the loss, what was right, the flags.
    """
    own = Exchange("all_reduce", 1, numbers, 8)
    # The gradients' norm, and whether one overflowed.
    checks = Exchange("all_reduce", 3 if value_bytes == 2 and stage < 3 else 2, 2, 4)
    if stage == 0:
        return [Exchange("all_reduce", 1, parameters, value_bytes), own]
    passes, buckets = lane_groups if stage >= 2 else 1, -(-parameters // bucket)
    kind = "reduce_scatter" if stage == 3 else "all_reduce"
    gradients = Exchange(kind, passes * buckets, passes * parameters, value_bytes)
    weights = Exchange("all_gather", tensors if stage == 3 else 2, parameters, value_bytes)
    return [gradients, weights, checks, own]


def sent_bytes(found: list[Exchange], ranks: int) -> float:
    """What a rank sends in all of them (and receives as much), in rings."""
    return sum(_PASSES[one.kind] * one.bytes for one in found) * (ranks - 1) / ranks


@dataclass(frozen=True)
class Network:
    """`within`: bytes/s of a GPU to others of its host; `between`: bytes/s of a host to others, in each direction.

    `latency`: seconds of a step from host to host. Of both rates a collective reaches `_REACHED`.
    """

    name: str
    gpus_per_host: int
    within: float
    between: float
    latency: float


_REACHED = 0.8
_STEP_WITHIN = 3e-6  # seconds of a step from GPU to GPU of a host
NVLINK = Network("NVLink within, 8 x 400 Gb/s InfiniBand between", 8, 450e9, 400e9, 10e-6)
INFINIBAND = Network("PCIe within, 1 x 200 Gb/s InfiniBand between", 8, 25e9, 25e9, 10e-6)
ETHERNET = Network("PCIe within, 1 x 100 Gb/s Ethernet between", 8, 25e9, 12.5e9, 40e-6)
SLOW_ETHERNET = Network("PCIe within, 1 x 10 Gb/s Ethernet between", 8, 25e9, 1.25e9, 40e-6)
NETWORKS = (NVLINK, INFINIBAND, ETHERNET, SLOW_ETHERNET)


def exchange_seconds(found: list[Exchange], ranks: int, network: Network) -> float:
    """How long they take one after the other, nothing else going on.

    Hosts are a level of their own, as in NCCL's rings and trees: within a host each GPU passes on its share, between
    hosts all GPUs of a host share its links; the slower of the two decides. A call costs a latency a doubling.
    """
    hosts = -(-ranks // network.gpus_per_host)
    inside = min(ranks, network.gpus_per_host)
    seconds = 0.0
    for one in found:
        volume = _PASSES[one.kind] * one.bytes
        within = volume * (inside - 1) / inside / network.within
        between = volume * (hosts - 1) / hosts / network.between
        steps = _STEP_WITHIN * log2(inside) + network.latency * log2(hosts)
        seconds += max(within, between) / _REACHED + one.calls * steps
    return seconds


def tokens_for_share(
    found: list[Exchange], ranks: int, network: Network, tokens_per_second: float, share: float = 0.05
) -> float:
    """Tokens of an update, K x a rank's lanes, from which on the exchange takes no more than this share of its time."""
    return exchange_seconds(found, ranks, network) * tokens_per_second * (1 - share) / share
