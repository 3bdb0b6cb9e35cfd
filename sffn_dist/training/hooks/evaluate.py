"""Held-out loss every ``evaluation.interval`` steps."""

from __future__ import annotations

import time

from sffn_dist import model as models
from sffn_dist.inference.evaluation import EvaluationResult, evaluate
from sffn_dist.parallel.object_collectives import broadcast_object
from sffn_dist.spec import schedule
from sffn_dist.spec.config import Config
from sffn_dist.training.hooks.base import Hook
from sffn_dist.training.run import TrainingRun
from sffn_dist.training.step_result import StepResult


class Evaluate(Hook):
    """Not where the run stops: a stop does not wait for it, and the next start makes up for it
    (:func:`evaluate_missed`).
    """

    def __init__(self, config: Config):
        self._interval = config.evaluation.interval

    def due(self, run: TrainingRun, result: StepResult) -> bool:
        total = run.schedule.total_steps
        return schedule.interval_reached(run.step, self._interval, total) and not result.stop

    def __call__(self, run: TrainingRun, result: StepResult) -> None:
        evaluate_run(run)


def evaluate_missed(run: TrainingRun) -> None:
    """Evaluate at a start where an evaluation was due when a signal stopped the run.

    All ranks must call it.
    """
    total = run.schedule.total_steps
    reached = schedule.interval_reached(run.step, run.config.evaluation.interval, total)
    missed = run.reports is not None and run.reports.evaluations.last != run.step
    if 0 < run.step < total and reached and broadcast_object(missed):
        evaluate_run(run)


def evaluate_run(run: TrainingRun) -> EvaluationResult:
    """Held-out loss after ``run.step`` steps: of the mix that is trained while guided, of the structure
    alone at the end.
    """
    if run.step in run.evaluated:
        return run.evaluated[run.step]
    started = time.perf_counter()
    if run.step == run.schedule.total_steps:
        models.unset_guide(run.model)
    else:
        models.mix_guide(run.model, run.schedule.alpha(run.step))
    with run.interruption.allowed(run.step, "evaluation"):
        result = evaluate(
            run.model,
            run.watchdog.with_progress(models.token_losses, "evaluation", run.step),
            run.heldout.windows,
            run.heldout.text_bytes,
            run.config.micro_batch_size,
            run.topology,
            bytes_estimated=run.heldout.estimated,
        )
    run.evaluated[run.step] = result
    if run.reports:
        run.reports.evaluated(run.step, result, time.perf_counter() - started)
    return result
