"""The group `data`: stores, lanes and windows, and the order of the documents."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import Field, model_validator

from gptb_ds.config.group import AUTO_LANES, Group, Switch, auto_as


class DataConfig(Group):
    path: list[str] = Field(min_length=1, description="stores made by `gptb-ds prepare` (several make a mixture)")
    weights: list[float] | None = Field(None, description="share of the tokens for each store of a mixture")
    lanes: Annotated[int, auto_as(AUTO_LANES, 1)] = Field(
        64,
        description="L: global document streams, fixed for a run (auto: the fewest that nearly reach the best tokens/s,"
        " measured before the run)",
    )
    window: int = Field(16, ge=1, description="K: columns of one forward/backward")
    seed: int = Field(0, ge=0, description="order of the documents")
    max_document_tokens: int | None = Field(
        None, ge=1, description="cut longer documents into pieces of so many tokens"
    )
    skip: list[str] = Field(
        [], description="LANES:FROM-TO = columns that are read but not learnt from, say 0-15:20000-20479"
    )

    keep_state_probability: float = Field(
        0.0, ge=0, lt=1, description="so often a document starts on top of the state that the one before left"
    )
    stagger: Switch = Field(
        "auto",
        description="lanes out of step: each enters its first document of an epoch inside (auto: with"
        " max_document_tokens)",
    )

    @model_validator(mode="before")
    @classmethod
    def _one_path_is_a_list(cls, values: object) -> object:
        if isinstance(values, dict):
            values = dict(values)
            if isinstance(values.get("skip"), str):
                values["skip"] = [values["skip"]]
            if isinstance(values.get("path"), str):
                values["path"] = [values["path"]]
            if isinstance(values.get("weights"), (int, float, str)):
                values["weights"] = [values["weights"]]
        return values

    @model_validator(mode="after")
    def _weights_match_stores(self) -> DataConfig:
        if self.weights is not None:
            if len(self.weights) != len(self.path):
                raise ValueError(
                    f"data.weights has {len(self.weights)} numbers for {len(self.path)} stores; give one for each"
                )
            if min(self.weights) <= 0:
                raise ValueError(
                    f"data.weights {self.weights} must all be above 0; leave out a store that has no share"
                )
        return self

    @model_validator(mode="after")
    def _skips_are_lanes_and_columns(self) -> DataConfig:
        self.skips()
        return self

    @property
    def is_staggered(self) -> bool:
        """Whether lanes are out of step."""
        return self.stagger == "on" or (self.stagger == "auto" and self.max_document_tokens is not None)

    def skips(self) -> tuple[tuple[range, range], ...]:
        """(lanes, columns) of each skip. Raises ValueError naming one that is none."""
        found = []
        for text in self.skip:
            match = re.fullmatch(r"(\d+)(?:-(\d+))?:(\d+)(?:-(\d+))?", text)
            first, last, begin, end = (int(n) if n else None for n in match.groups()) if match else (None,) * 4
            lanes = range(first or 0, (first or 0 if last is None else last) + 1)
            columns = range(begin or 0, (begin or 0 if end is None else end) + 1)
            beyond = self.lanes != AUTO_LANES and lanes.stop > self.lanes
            if first is None or not lanes or not columns or beyond:
                most = "" if self.lanes == AUTO_LANES else f" lanes of 0 to {self.lanes - 1} and"
                raise ValueError(
                    f"data.skip {text!r}: must be LANES:FROM-TO, such as 0-15:20000-20479, with{most} columns that"
                    " ascend"
                )
            found.append((lanes, columns))
        return tuple(found)
