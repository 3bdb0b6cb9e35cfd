"""The config's section ``profile``."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from sffn_dist.spec.config_types import NaturalInt, Section

MAX_STEPS = 100  # the events of all of them are held in host memory


def step_range(text: str) -> range:
    """ "10:13" -> steps 10, 11, 12.

    Raises PydanticCustomError, a ValueError.
    """
    numbers = re.fullmatch(r"([0-9]{1,15}):([0-9]{1,15})", text)
    if numbers is None or int(numbers[1]) >= int(numbers[2]):
        raise PydanticCustomError(
            "step_range",
            "must read FIRST:END with whole numbers FIRST < END; END is not profiled: 10:13 are steps 10, 11 "
            "and 12",
        )
    steps = range(int(numbers[1]), int(numbers[2]))
    if len(steps) > MAX_STEPS:
        raise PydanticCustomError(
            "step_range", "must be at most {most} steps, whose events are held in memory", {"most": MAX_STEPS}
        )
    return steps


def _check_range(text: str) -> str:
    step_range(text)
    return text


class Profile(Section):
    """Which steps torch's profiler records, and on which ranks."""

    steps: Annotated[str, AfterValidator(_check_range)] | None = Field(
        None,
        description="FIRST:END, as 10:13 for steps 10, 11 and 12, numbered from 0 as in metrics.jsonl; "
        "null: none",
    )
    ranks: Annotated[tuple[NaturalInt, ...], Field(min_length=1)] = Field(
        (0,), description="ranks that record them; the others wait while these write"
    )
