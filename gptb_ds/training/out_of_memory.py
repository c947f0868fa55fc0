"""What a run says when a GPU's memory does not suffice: what it held there, and what would need less."""

from __future__ import annotations

from math import isqrt

from gptb_ds.config import divisors
from gptb_ds.training.train_state import RunFacts


def out_of_memory(error: BaseException, facts: RunFacts, ranks: int) -> str:
    """One line: torch's own words, lanes, window, recomputation and lane groups, and settings that would need less."""
    lanes, groups, every = facts.lanes // ranks, facts.train.lane_groups, facts.train.recompute_every
    said = (str(error).strip().splitlines() or ["out of memory"])[0].rstrip(".")
    held = every or facts.window
    remedies = []
    shorter = max(1, isqrt(facts.window))
    if shorter < held:
        remedies.append(f"--train.recompute_every {shorter} keeps {shorter} columns and computes a third more")
    more = next((n for n in divisors(lanes) if n > groups and n % groups == 0), None)
    if more is not None:
        remedies.append(f"--train.lane_groups {more} keeps {groups}/{more} of the lanes at once")
    remedies.append("a policy of a higher ZeRO stage, or with offload, takes optimizer state off the GPU")
    return (
        f"{said}. A backward pass holds {held} of the window's {facts.window} columns for {lanes // groups} lanes"
        f" (data.lanes {facts.lanes} on {ranks} rank(s), train.lane_groups {groups}, train.recompute_every {every})."
        f" With less: {'; '.join(remedies)}"
    )
