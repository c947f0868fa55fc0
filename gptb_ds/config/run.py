"""The group `run`: its folder, checkpoints and reports, and what ends it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from gptb_ds.config.group import Group


class RunConfig(Group):
    dir: str = Field("runs/run", description="folder of the run")
    resume: str = Field("auto", description="auto, never, or a checkpoint's folder")
    resume_optimizer: Literal["same", "switch"] = Field(
        "same", description="switch: a checkpoint of another optimizer is taken, and moments start anew"
    )
    save_every: int = Field(500, ge=0, description="updates between checkpoints (0 = only at the end)")
    snapshot_every: int = Field(
        0,
        ge=0,
        description="updates between snapshots in memory, which training goes back to when the loss jumps (0 = none)",
    )
    jump_deviations: float = Field(
        6.0, gt=0, description="standard deviations above its average at which a window's loss has jumped"
    )
    max_rewinds: int = Field(10, ge=0, description="how often training goes back; later jumps are reported only")
    keep: int = Field(2, ge=1, description="newest checkpoints kept")
    log_every: int = Field(10, ge=1, description="updates between progress lines")
    eval_every: int = Field(
        500, ge=0, description="updates between evaluations, the first before any (0 = only at the end)"
    )
    eval_tokens: int = Field(100_000, ge=1, description="held-out tokens of an evaluation while training")
    state_health: bool = Field(True, description="measure the state's norm, worth and stability at each evaluation")
    sample_every: int = Field(0, ge=0, description="updates between text samples (0 = none)")
    sample_tokens: int = Field(200, ge=1, description="tokens of a sample")
    max_seconds: float | None = Field(None, gt=0, description="stop with a checkpoint and exit code 85 after so long")
    hang_seconds: float = Field(600, gt=0, description="end the job when nothing moves for so long")
    lost_seconds: float = Field(
        30, gt=0, description="end the job when a rank or its host gives no sign of life for so long"
    )
    profile: bool = Field(
        False, description="measure where the time goes, into RUN/profile: a table and a trace (also: --profile)"
    )
    stop_margin: float = Field(120, ge=0, description="seconds before the end of a Slurm job at which to stop")
    on_save_error: Literal["stop", "continue"] = Field("stop", description="when a checkpoint cannot be written")
    monitor: list[Literal["tensorboard", "csv", "wandb"]] = Field([], description="metric sinks beside metrics.jsonl")

    @model_validator(mode="before")
    @classmethod
    def _one_monitor_is_a_list(cls, values: object) -> object:
        if isinstance(values, dict) and isinstance(values.get("monitor"), str):
            values = dict(values) | {"monitor": [values["monitor"]]}
        return values
