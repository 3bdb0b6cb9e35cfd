"""Curves of the guide's weight and of the learning rate, over x from 0 to 1. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Callable

Curve = Callable[[float], float]


def cosine(x: float) -> float:
    """(1 + cos(pi x)) / 2   (paper, section 4, and appendix)."""
    return 0.5 * (1.0 + math.cos(math.pi * x))


def linear(x: float) -> float:
    """1 - x."""
    return 1.0 - x


def constant(x: float) -> float:
    """1."""
    return 1.0


# values of guide.schedule. Each curve falls from 1 to 0 and f(x) + f(1 - x) = 1: so the sum of alpha over n
# guided steps is (n + 1)/2, on which the FLOPs of a stochastic guide are counted (spec/schedule.py)
GUIDE_SCHEDULES: dict[str, Curve] = {
    "cosine": cosine,
    "linear": linear,
}
# values of train.learning_rate_schedule, after the warm-up: 1 is train.learning_rate, 0 its minimum. Each
# curve starts at 1
LEARNING_RATE_SCHEDULES: dict[str, Curve] = {
    "cosine": cosine,
    "linear": linear,
    "constant": constant,
}
