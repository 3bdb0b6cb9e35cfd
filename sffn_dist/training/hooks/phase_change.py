"""At a phase boundary the engine is built again, with the guide or without it (phases.py)."""

from __future__ import annotations

from sffn_dist.training import phases
from sffn_dist.training.hooks.base import Hook
from sffn_dist.training.run import TrainingRun
from sffn_dist.training.step_result import StepResult


class PhaseChange(Hook):
    """Brings the run into the phase of its next step."""

    def due(self, run: TrainingRun, result: StepResult) -> bool:
        return phases.changes(run)

    def __call__(self, run: TrainingRun, result: StepResult) -> None:
        phases.enter(run)
