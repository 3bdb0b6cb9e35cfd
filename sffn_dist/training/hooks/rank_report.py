"""A report of all ranks' speed when one is requested: SIGUSR2, or the file ``report`` in run.dir."""

from __future__ import annotations

from sffn_dist.training import reporting
from sffn_dist.training.hooks.base import Hook
from sffn_dist.training.run import TrainingRun
from sffn_dist.training.step_result import StepResult


class RankReport(Hook):
    """On CUDA the report follows one step later: that step waits for the device at each mark, so that its
    times are right.
    """

    def due(self, run: TrainingRun, result: StepResult) -> bool:
        return result.report or run.timers.precise

    def __call__(self, run: TrainingRun, result: StepResult) -> None:
        if run.topology.device.type == "cuda" and not run.timers.precise:
            run.timers.precise = True
            return
        run.timers.precise = False
        reporting.report_ranks(run)
