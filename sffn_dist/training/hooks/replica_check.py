"""Replicas of the weights are compared every ``guards.replicas_interval`` steps and before every save."""

from __future__ import annotations

from sffn_dist.health import replica_check
from sffn_dist.spec.config import Config
from sffn_dist.training import engine_state
from sffn_dist.training.hooks.base import Hook
from sffn_dist.training.hooks.checkpoint import SaveCheckpoint
from sffn_dist.training.run import TrainingRun
from sffn_dist.training.step_result import StepResult


class ReplicaCheck(Hook):
    """Raises ReplicasDifferError on every rank."""

    def __init__(self, config: Config, save: SaveCheckpoint):
        self._interval, self._save = config.guards.replicas_interval, save

    def due(self, run: TrainingRun, result: StepResult) -> bool:
        return self._interval > 0 and (run.step % self._interval == 0 or self._save.due(run, result))

    def __call__(self, run: TrainingRun, result: StepResult) -> None:
        replica_check.check_replicas(
            run.model, engine_state.separate_masters(run.engine), run.config, run.topology
        )
