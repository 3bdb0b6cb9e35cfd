"""What happens beside a step. One class a file; their order stands in :func:`standard_hooks`."""

from __future__ import annotations

from sffn_dist.spec.config import Config
from sffn_dist.training.hooks.base import Hook
from sffn_dist.training.hooks.checkpoint import SaveCheckpoint
from sffn_dist.training.hooks.evaluate import Evaluate
from sffn_dist.training.hooks.phase_change import PhaseChange
from sffn_dist.training.hooks.rank_report import RankReport
from sffn_dist.training.hooks.replica_check import ReplicaCheck
from sffn_dist.training.hooks.rollback import Rollback
from sffn_dist.training.hooks.save_failures import SaveFailures


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
        SaveFailures(),
    ]
