"""What a hook is: asked after every step whether it is due, and called if so."""

from __future__ import annotations

import abc

from sffn_dist.training.run import TrainingRun
from sffn_dist.training.step_result import StepResult


class Hook(abc.ABC):
    """``run.step`` is the next step when a hook is asked and called.

    All ranks must come to the same answer.
    """

    rewinds = False  # True if it takes the run back to an earlier step: the hooks after it are left out then

    @abc.abstractmethod
    def due(self, run: TrainingRun, result: StepResult) -> bool:
        """Whether the hook is to be called after this step."""

    @abc.abstractmethod
    def __call__(self, run: TrainingRun, result: StepResult) -> None:
        """Do what is due."""
