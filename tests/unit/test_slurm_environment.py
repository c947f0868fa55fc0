"""What Slurm tells a job is understood."""

from __future__ import annotations

from gptb_ds.distributed.slurm import slurm_continues, slurm_end


def test_slurm_end():
    assert slurm_end({"SLURM_JOB_END_TIME": "1700000000"}) == 1.7e9
    assert slurm_end({"SLURM_JOB_END_TIME": "Unknown"}) is None
    assert slurm_end({}) is None


def test_when_slurm_started_a_job_before():
    assert not slurm_continues({}) and not slurm_continues({"SLURM_RESTART_COUNT": "0"})
    assert slurm_continues({"SLURM_RESTART_COUNT": "2"})
    assert not slurm_continues({"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_MIN": "1"})
    assert slurm_continues({"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_MIN": "1"})
