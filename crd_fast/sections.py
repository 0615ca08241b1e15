"""What every section of a recipe has in common: how it is checked."""

from __future__ import annotations

import os
import re
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationInfo, field_validator

Place = Annotated[str, AfterValidator(os.path.expanduser)]  # a path, with ~ for one's home, or a name


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


def _kinds(annotation: Any) -> set[type]:
    """The plain types of a field, those inside unions too."""
    inside = get_args(annotation)
    return set().union(*map(_kinds, inside)) if inside else {annotation} & {bool, int, float, str}
