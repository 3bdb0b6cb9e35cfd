"""Types of the config's values, and what its sections share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainValidator
from pydantic_core import PydanticCustomError

from sffn_dist.spec.decay import GUIDE_SCHEDULES, LEARNING_RATE_SCHEDULES
from sffn_dist.spec.optimizers import OPTIMIZERS
from sffn_dist.structured import registry
from sffn_dist.structured.registry import listed

PositiveInt = Annotated[int, Field(gt=0, lt=2**53)]  # what a JSON number and a float hold exactly
NaturalInt = Annotated[int, Field(ge=0, lt=2**53)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
OpenFraction = Annotated[float, Field(gt=0, lt=1)]


def _one_of(names: Callable[[], Iterable[str]]) -> AfterValidator:
    """A text must be one of ``names``, which a table lists when a config is read."""

    def check(name: str) -> str:
        if name not in names():
            raise PydanticCustomError("choice", "must be {choices}", {"choices": listed(names())})
        return name

    return AfterValidator(check)


FFNKind = Annotated[str, _one_of(registry.kinds)]
GuideSchedule = Annotated[str, _one_of(lambda: GUIDE_SCHEDULES)]
LearningRateSchedule = Annotated[str, _one_of(lambda: LEARNING_RATE_SCHEDULES)]
OptimizerName = Annotated[str, _one_of(lambda: OPTIMIZERS)]


def _positive_or_auto(value: Any) -> Any:
    """One rule, and one message, where a union would have two."""
    if value == "auto" or (type(value) is int and 0 < value < 2**53):
        return value
    raise PydanticCustomError("choice", "must be a positive integer, or auto")


MicroBatchSize = Annotated[int | Literal["auto"], PlainValidator(_positive_or_auto)]


class Section(BaseModel):
    """A named group of settings."""

    # strict: "4" is not an int and 1 is not a bool; an int where a float is expected is fine
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
