"""The config's section ``guards``."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from sffn_dist.spec.config_types import NaturalInt, NonNegativeFloat, PositiveFloat, Section


class Guards(Section):
    """What is watched while a run trains, and what happens to what goes wrong."""

    preflight: bool = Field(
        True, description="before the first step: do all ranks agree, does every collective work, who is slow"
    )
    hang_seconds: NonNegativeFloat = Field(
        600.0, description="no progress for so long ends the run with every rank's stack; 0: never"
    )
    lost_seconds: NonNegativeFloat = Field(
        30.0, description="no heartbeat of a rank for so long ends the run; 0: never"
    )
    stop_seconds: PositiveFloat = Field(
        25.0,
        description="after SIGTERM, SIGINT or the launcher's end: the state is saved and the process gone "
        "by then",
    )
    replicas_interval: NaturalInt = Field(
        100, description="steps between comparisons of the replicas' weights; 0: none"
    )
    spike_deviations: NonNegativeFloat = Field(
        10.0,
        description="a loss so many robust standard deviations above the median of the last ones is a "
        "spike; 0: none is",
    )
    spike_margin: NonNegativeFloat = Field(
        0.5, description="nats above that median that a spike has at least"
    )
    spike_window: Annotated[int, Field(ge=8, le=10_000)] = Field(
        128, description="losses that the median is taken over"
    )
    rollback_after: NaturalInt = Field(
        3, description="skipped steps in a row that send the run back to a checkpoint; 0: none do"
    )
    max_rollbacks: NaturalInt = Field(
        3, description="rollbacks, without a checkpoint beyond the last bad step, after which the run stops"
    )
