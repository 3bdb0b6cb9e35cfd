"""Saves every ``checkpoint.interval`` steps, at the end, and when a signal stops the run."""

from __future__ import annotations

import time
from pathlib import Path

from sffn_dist.checkpoint import writer
from sffn_dist.launch import exit_codes
from sffn_dist.launch.signals import Stop
from sffn_dist.spec import schedule
from sffn_dist.spec.config import Config
from sffn_dist.spec.split_table import is_guide
from sffn_dist.training import engine_state
from sffn_dist.training.hooks.base import Hook
from sffn_dist.training.run import TrainingRun
from sffn_dist.training.step_result import StepResult


class LostWeightsError(RuntimeError):
    """Training is over and its result is not on disk."""

    exit_code = exit_codes.FAILED


class SaveCheckpoint(Hook):
    """No save falls due between bad steps (bad_steps.can_save); it is made up for after them.

    A stop signal and the run's last step save there all the same.
    """

    def __init__(self, config: Config):
        self._interval = config.checkpoint.interval
        self._pending = False  # a save fell due between bad steps; set by due()

    def due(self, run: TrainingRun, result: StepResult) -> bool:
        total = run.schedule.total_steps
        self._pending |= schedule.interval_reached(run.step, self._interval, total)
        allowed = run.bad_steps.can_save or run.step == total
        return result.stop is not None or (self._pending and allowed)

    def __call__(self, run: TrainingRun, result: StepResult) -> None:
        save(run)
        self._pending = False


def save(run: TrainingRun) -> None:
    """Begin a checkpoint of ``run.step``.

    A failed one (disk full, folder gone) is reported and does not stop training.
    """
    started = time.perf_counter()
    steps, guide_steps = engine_state.step_counts(run.engine)
    guided = run.schedule.guided(run.step)
    held = (
        fragment for fragment in engine_state.fragments(run.engine) if guided or not is_guide(fragment.name)
    )
    fragments = writer.owned_fragments(held, run.config, run.topology)
    position = writer.Position(
        run.step,
        steps,
        guide_steps if guided else None,
        run.data_fingerprint,
        tuple(run.bad_steps.losses.recent),
    )
    wait_for_save(run)  # of the one before, which must not seem a hang
    run.saver.save(position, fragments)
    run.bad_steps.record_save(run.step)
    if run.reports:
        run.reports.estimate.observe("checkpoint", time.perf_counter() - started)


def require_saved(run: TrainingRun, stop: Stop | None = None) -> None:
    """The end of training: its last save is on disk, tried twice at the run's end.

    Raises LostWeightsError on every rank.
    """
    total = run.schedule.total_steps
    path = finished_save(run)
    if stop:
        if path is None:
            raise LostWeightsError(
                f"{stop.name}: the state after step {run.step} could not be saved in {run.dir}; see the "
                f"warnings above"
            )
        text = f"stopped by {stop.name} after step {run.step} of {total}; saved in {path}"
        run.tell("stopped", text, signal=stop.name)
    elif path is None and run.steps_taken:
        save(run)  # the last save is worth a second try
        if finished_save(run) is None:
            raise LostWeightsError(
                f"the finished run's weights could not be saved in {run.dir}; see the warnings above"
            )


def finished_save(run: TrainingRun) -> Path | None:
    """The checkpoint begun last, once it is written; None if that failed, on every rank."""
    path = wait_for_save(run)
    report_failures(run)
    return path


def report_failures(run: TrainingRun, consequence: str = "") -> None:
    """Report saves that failed since the last call, and what follows."""
    for problem in run.saver.pop_failures():
        if run.reports:
            run.reports.progress.note(f"warning: {problem}{consequence}")


def wait_for_save(run: TrainingRun) -> Path | None:
    """Let a save end, however slow the disk is."""
    while run.saver.writing:
        run.watchdog.tick("saving", run.step)
        run.saver.wait(5.0)
    return run.saver.wait()
