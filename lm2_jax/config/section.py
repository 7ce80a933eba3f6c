"""Building blocks of a config's sections: the base class, types of values, and checks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

LARGEST = 2**31 - 1  # of integers: array sizes are int32
PositiveInt = Annotated[int, Field(gt=0, le=LARGEST)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0, le=LARGEST)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
AxisSize = Annotated[int, Field(ge=-1, le=LARGEST)]
NonEmptyStr = Annotated[str, Field(min_length=1)]
ONE_OR_MORE = BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)  # a single text is a list
Texts = Annotated[tuple[NonEmptyStr, ...], ONE_OR_MORE]


class Section(BaseModel):
    """A frozen, hashable group of settings that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _no_number_is_yes(cls, value: Any, info: ValidationInfo) -> Any:
        # pydantic would read the true of YAML's "yes" and "on" as 1
        if isinstance(value, bool) and cls.model_fields[info.field_name].annotation is not bool:
            raise PydanticCustomError("bool", "should not be yes or no (put it in quotes if it is meant as text)")
        return value


def raise_problems(problems: Sequence[str]) -> None:
    """Ends a validator: raises ValueError with all problems, one a line, if there are any."""
    if problems:
        raise ValueError("\n".join(problems))


def pattern_problem(document_separator: str | None) -> str | None:
    """Returns why the value is not a regular expression; None if it is one, or None."""
    try:
        re.compile(document_separator or "")
    except (re.error, OverflowError, RecursionError) as error:
        return f"document_separator {document_separator!r} is not a regular expression: {error}"
    return None
