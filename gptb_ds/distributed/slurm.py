"""What Slurm tells a job in its environment."""

from __future__ import annotations

from collections.abc import Mapping


def slurm_end(env: Mapping[str, str]) -> float | None:
    """When Slurm will end this job (seconds since the epoch), where Slurm tells (22.05 and later)."""
    value = env.get("SLURM_JOB_END_TIME", "")
    return float(value) if value.isdigit() and int(value) > 0 else None


def slurm_continues(env: Mapping[str, str]) -> bool:
    """Whether Slurm started this job before: requeued, or a later link of an array that chains."""
    restarted = int(env.get("SLURM_RESTART_COUNT") or 0) > 0
    return restarted or env.get("SLURM_ARRAY_TASK_ID", "") != env.get("SLURM_ARRAY_TASK_MIN", "")
