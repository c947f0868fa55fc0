"""What every group of keys has in common, and the kinds of values that are ours."""

from __future__ import annotations

import re
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError


class Group(BaseModel):
    """A frozen group of keys; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False, str_min_length=1)

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: object, info: ValidationInfo) -> object:
        """`updates: true` (or YAML's `yes`) would be 1, and so would one in a list."""
        kinds = _plain_types(cls.model_fields[info.field_name or ""].annotation)
        holds_truth = any(isinstance(each, bool) for each in (value if isinstance(value, list) else [value]))
        if holds_truth and kinds & {int, float} and bool not in kinds:
            raise PydanticCustomError("bool_as_number", "Input should be a number, not a truth value")
        return value


def _plain_types(annotation: object) -> set[object]:
    return {annotation}.union(*map(_plain_types, get_args(annotation)))


def _as_switch(value: object) -> object:
    return {"true": "on", "false": "off"}.get(str(value).lower(), value)


# YAML reads `on` and `off` as truth values, and a truth value can be given for them.
SWITCH = BeforeValidator(_as_switch)
Switch = Annotated[Literal["auto", "on", "off"], SWITCH]


# Numbers that stand for "auto" until the run's first stage has decided: nobody can give them.
AUTO_LANES, AUTO_RECOMPUTE = 0, -1


def auto_as(stands_for: int, least: int) -> BeforeValidator:
    """ "auto", or a whole number of at least `least`."""

    def check(value: object) -> object:
        if value == "auto":
            return stands_for
        if isinstance(value, (int, str)) and re.fullmatch(r"[+-]?\d+", str(value)) and int(value) < least:
            raise PydanticCustomError(
                "too_small", "Input should be auto, or greater than or equal to {n}", {"n": least}
            )
        return value

    return BeforeValidator(check)
