"""Saves are written beside the training: what became of one is reported after the next step."""

from __future__ import annotations

from sffn_dist.training.hooks.base import Hook
from sffn_dist.training.hooks.checkpoint import report_failures
from sffn_dist.training.run import TrainingRun
from sffn_dist.training.step_result import StepResult

# seconds of a stop before its save begins: all ranks are held within the same step (interruption.py)
_HOLD_SECONDS = 2.0


class SaveReport(Hook):
    """Asked after every step: reading a list and a number costs nothing."""

    def __init__(self) -> None:
        self._slow_save_told = False

    def due(self, run: TrainingRun, result: StepResult) -> bool:
        return True

    def __call__(self, run: TrainingRun, result: StepResult) -> None:
        report_failures(run, "; training goes on")
        warning = slow_save_warning(run.saver.seconds, run.config.guards.stop_seconds)
        if warning and run.reports and not self._slow_save_told:
            self._slow_save_told = True
            run.reports.progress.note(f"warning: {warning}")


def slow_save_warning(seconds: float, stop_seconds: float) -> str | None:
    """What to say of a save that took ``seconds``, which a stop would not have; None before the first one."""
    if not seconds or seconds + _HOLD_SECONDS <= stop_seconds:
        return None
    return (
        f"the last save took {seconds:.1f} s, too long for a stop by SIGTERM or Ctrl-C "
        f"(guards.stop_seconds = {stop_seconds:g}): what was trained since the newest checkpoint would be "
        "lost. Raise guards.stop_seconds, with the 30 s after which deepspeed, torchrun and Slurm kill "
        "(Slurm's KillWait); or stop with SIGUSR1, as the batch scripts do, which has no limit"
    )
