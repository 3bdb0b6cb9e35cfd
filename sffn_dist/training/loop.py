"""The loop: a step, then what is due after it (hooks/)."""

from __future__ import annotations

import signal

from sffn_dist.training import reporting
from sffn_dist.training.hooks import standard_hooks
from sffn_dist.training.hooks.checkpoint import require_saved
from sffn_dist.training.hooks.evaluate import evaluate_missed
from sffn_dist.training.run import TrainingRun
from sffn_dist.training.step import skip_step, train_step


def train(run: TrainingRun) -> signal.Signals | None:
    """Take every step that is left, or those until a signal, which is returned once the state is saved.

    Raises LostWeightsError, DivergedError or ReplicasDifferError, each on every rank.
    """
    hooks = standard_hooks(run.config)
    reporting.announce_bound(run)
    evaluate_missed(run)
    while run.step < run.schedule.total_steps:
        result = skip_step(run) if run.step in run.bad_steps.excluded else train_step(run)
        for hook in hooks:
            if hook.due(run, result):
                hook(run, result)
                if hook.rewinds:
                    break  # the run stands at an earlier step: what follows was due after another one
        else:
            if result.stop:
                require_saved(run, result.stop)
                return result.stop
    require_saved(run)
    return None
