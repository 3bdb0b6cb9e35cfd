"""Python's reference cycles are collected between steps, on all ranks at the same ones.

Left to itself the collector stops one rank here and another there, in the middle of a step, and all wait for
each. In the loop it is off (training/loop.py).
"""

from __future__ import annotations

import gc

from sffn_dist.training.hooks.base import Hook
from sffn_dist.training.run import TrainingRun
from sffn_dist.training.step_result import StepResult

YOUNG_STEPS = 50  # steps between collections of what is younger than the last but one of them: milliseconds
ALL_STEPS = 1000  # of everything: tenths of a second


class CollectGarbage(Hook):
    """By the step's number, which every rank has alike."""

    def due(self, run: TrainingRun, result: StepResult) -> bool:
        return run.step % YOUNG_STEPS == 0

    def __call__(self, run: TrainingRun, result: StepResult) -> None:
        gc.collect(2 if run.step % ALL_STEPS == 0 else 1)
