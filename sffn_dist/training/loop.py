"""The loop: a step, then what is due after it (hooks/)."""

from __future__ import annotations

import gc

from sffn_dist.launch.signals import Stop
from sffn_dist.training import reporting
from sffn_dist.training.hooks import call_hooks, standard_hooks
from sffn_dist.training.hooks.base import Hook
from sffn_dist.training.hooks.checkpoint import require_saved
from sffn_dist.training.hooks.evaluate import evaluate_missed
from sffn_dist.training.run import TrainingRun
from sffn_dist.training.step import skip_excluded_batch, train_step


def train(run: TrainingRun) -> Stop | None:
    """Train to the last step. On a stop: save, then return it.

    Raises LostWeightsError, DivergedError or ReplicasDifferError, each on every rank.
    """
    hooks = standard_hooks(run.config)
    reporting.announce_bound(run)
    evaluate_missed(run)
    gc.disable()  # hooks/collect_garbage.py
    try:
        return _train(run, hooks)
    finally:
        gc.enable()


def _train(run: TrainingRun, hooks: list[Hook]) -> Stop | None:
    while run.step < run.schedule.total_steps:
        excluded = run.step in run.bad_steps.excluded
        result = skip_excluded_batch(run) if excluded else train_step(run)
        rewound = call_hooks(hooks, run, result)
        if result.stop and not rewound:
            require_saved(run, result.stop)
            return result.stop
    require_saved(run)
    return None
