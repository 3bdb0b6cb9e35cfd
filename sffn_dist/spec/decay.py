"""Curves that fall from 1 at x = 0 to 0 at x = 1: the guide's weight, the learning rate after warm-up.

Standard library only.

Each is antisymmetric about its middle, f(x) + f(1 - x) = 1: so the sum of alpha over n guided steps is (n +
1)/2, on which the FLOPs of a stochastic guide are counted (spec/schedule.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable


def cosine(x: float) -> float:
    """(1 + cos(pi x)) / 2   (paper, section 4, and appendix)."""
    return 0.5 * (1.0 + math.cos(math.pi * x))


def linear(x: float) -> float:
    """1 - x."""
    return 1.0 - x


# values of guide.schedule and train.learning_rate_schedule; another curve is a function and a line here
DECAYS: dict[str, Callable[[float], float]] = {
    "cosine": cosine,
    "linear": linear,
}
