"""Saves are written beside the training: one that failed is reported after the next step."""

from __future__ import annotations

from sffn_dist.training.hooks.base import Hook
from sffn_dist.training.hooks.checkpoint import report_failures
from sffn_dist.training.run import TrainingRun
from sffn_dist.training.step_result import StepResult


class SaveFailures(Hook):
    """Asked after every step: reading the list costs nothing."""

    def due(self, run: TrainingRun, result: StepResult) -> bool:
        return True

    def __call__(self, run: TrainingRun, result: StepResult) -> None:
        report_failures(run, "; training goes on")
