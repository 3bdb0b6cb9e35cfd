"""What came of a training step. Standard library only."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sffn_dist.launch.signals import Stop


@dataclass(frozen=True)
class StepResult:
    """What came of a step; the same on every rank, but for ``seconds``."""

    step: int
    loss: float = math.nan  # nats a token, mean over the global batch
    grad_norm: float = math.nan  # before clipping; not finite where the step was skipped
    guides_computed: int = 0  # linears that computed their guide
    skip_reason: str | None = None  # why no update was made; None where one was, or the batch was excluded
    stop: Stop | None = None  # the run ends after this step
    report: bool = False  # a report of all ranks is requested
    seconds: float = 0.0
