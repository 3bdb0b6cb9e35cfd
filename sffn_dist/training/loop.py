"""The loop: a step, then what is due after it (hooks/)."""

from __future__ import annotations

import gc
from collections.abc import Callable

from sffn_dist.launch.signals import Stop
from sffn_dist.training import profiling, reporting
from sffn_dist.training.hooks import call_hooks, standard_hooks
from sffn_dist.training.hooks.checkpoint import require_saved
from sffn_dist.training.hooks.evaluate import evaluate_missed
from sffn_dist.training.run import TrainingRun
from sffn_dist.training.step import skip_excluded_batch, train_step
from sffn_dist.training.step_result import StepResult


def train(run: TrainingRun) -> Stop | None:
    """Train to the last step. On a stop: save, then return it.

    Raises LostWeightsError, DivergedError or ReplicasDifferError, each on every rank.
    """
    reporting.announce_bound(run)
    evaluate_missed(run)
    gc.disable()  # hooks/collect_garbage.py
    try:
        with profiling.profiled(run, train_step) as step:
            return _train(run, step)
    finally:
        gc.enable()


def _train(run: TrainingRun, step: Callable[[TrainingRun], StepResult]) -> Stop | None:
    hooks = standard_hooks(run.config)
    while run.step < run.schedule.total_steps:
        excluded = run.step in run.bad_steps.excluded
        result = skip_excluded_batch(run) if excluded else step(run)
        rewound = call_hooks(hooks, run, result)
        if result.stop and not rewound:
            require_saved(run, result.stop)
            return result.stop
    require_saved(run)
    return None
