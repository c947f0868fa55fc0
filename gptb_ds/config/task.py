"""The group `task`: what is special to generated tasks."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from gptb_ds.config.group import SWITCH, Group


class TaskConfig(Group):
    curriculum: Annotated[Literal["auto", "off"], SWITCH] = Field(
        "auto", description="documents of a state-tracking task begin short and grow (text is never cut by it)"
    )
    start_length: int = Field(4, ge=1, description="tokens of the curriculum's longest documents at the start")
    grow_at: float = Field(0.95, gt=0, lt=1, description="running accuracy at which the curriculum's lengths double")
