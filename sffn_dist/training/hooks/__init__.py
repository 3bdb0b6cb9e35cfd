"""What happens beside a step. One class a file; their order stands in :func:`standard_hooks`."""

from __future__ import annotations

from collections.abc import Sequence

from sffn_dist.spec.config import Config
from sffn_dist.training.hooks.base import Hook
from sffn_dist.training.hooks.checkpoint import SaveCheckpoint
from sffn_dist.training.hooks.collect_garbage import CollectGarbage
from sffn_dist.training.hooks.evaluate import Evaluate
from sffn_dist.training.hooks.phase_change import PhaseChange
from sffn_dist.training.hooks.rank_report import RankReport
from sffn_dist.training.hooks.replica_check import ReplicaCheck
from sffn_dist.training.hooks.rollback import Rollback
from sffn_dist.training.hooks.save_report import SaveReport
from sffn_dist.training.run import TrainingRun
from sffn_dist.training.step_result import StepResult


def call_hooks(hooks: Sequence[Hook], run: TrainingRun, result: StepResult) -> bool:
    """Call the hooks that are due after a step, in order; True if one of them took the run back.

    The hooks after that one are left out: they were due after another step.
    """
    for hook in hooks:
        if hook.due(run, result):
            hook(run, result)
            if hook.rewinds:
                return True
    return False


def standard_hooks(config: Config) -> list[Hook]:
    """The hooks of a run, in the order in which they run after each step."""
    save = SaveCheckpoint(config)
    return [
        RankReport(),
        Rollback(),
        PhaseChange(),  # before anything of the next step is evaluated or saved
        Evaluate(config),
        ReplicaCheck(config, save),  # before a save: no checkpoint of replicas that differ
        save,
        SaveReport(),
        CollectGarbage(),
    ]
