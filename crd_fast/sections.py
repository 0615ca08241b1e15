"""What every section of a recipe has in common: how it is checked."""

from __future__ import annotations

import math
import os
import re
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

Place = Annotated[str, AfterValidator(os.path.expanduser)]  # a path, with ~ for one's home, or a name


LARGEST = {int: 10**6, float: (2 - 2**-23) * 2.0**127}  # of counts; of float32, that torch computes with
NO_COUNTS, LARGEST_INT64 = ("seed", "begin"), 2**63 - 1  # nothing is held of these


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _as_it_is_written(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuses what would be taken for a number, and was hardly meant as that one."""
        kinds = _kinds(cls.model_fields[info.field_name or ""].annotation)
        if not kinds & {int, float}:
            return value
        if isinstance(value, bool) and bool not in kinds:
            raise ValueError(f"expected a number, got {str(value).lower()}")
        if isinstance(value, str) and re.fullmatch(r"[-+]?0[\d_]+", value):
            raise ValueError(f"expected a number without zeros before it, got {value}")
        return value

    @field_validator("*")
    @classmethod
    def _can_be_computed_with(cls, value: Any, info: ValidationInfo) -> Any:
        largest = LARGEST_INT64 if info.field_name in NO_COUNTS else LARGEST.get(type(value))
        if largest is not None and largest < value < math.inf:
            raise PydanticCustomError("largest", f"Input should be at most {largest:.3g}")
        return value


def _kinds(annotation: Any) -> set[type]:
    """The plain types of a field, those inside unions too."""
    inside = get_args(annotation)
    return set().union(*map(_kinds, inside)) if inside else {annotation} & {bool, int, float, str}
