"""Steps that must not be taken: skipped as they come, and what follows when there are several in a row.

    one        its update is not made: a loss that is not finite or a spike (loss_spikes.py), a gradient that is not finite
    several    after guards.rollback_after of them in a row the run goes back to its newest checkpoint from before the first one, and
               passes their batches over when it comes there again; a second time without progress one checkpoint further back
    again      after guards.max_rollbacks returns without a checkpoint beyond the trouble the run stops

What was passed over is part of the run from then on: ``run_dir/passed_over.json``, read at every start. No checkpoint is saved between
bad steps, so that all there are come from before the trouble. A passed-over step has no loss: the schedule goes on without it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path

from sffn_dist.atomic_io import write_text
from sffn_dist.launch import exit_codes
from sffn_dist.spec.config import ConfigError, Guards
from sffn_dist.training.loss_spikes import LossHistory

log = logging.getLogger(__name__)
NAME = "passed_over.json"


class DivergedError(RuntimeError):
    """The run does not get beyond some step, though it went back and passed the batches there over."""

    exit_code = exit_codes.DIVERGED


class BadSteps:
    """The same on every rank, by the same losses."""

    def __init__(self, guards: Guards, run_dir: Path):
        self._guards, self._path = guards, run_dir / NAME
        self.losses = LossHistory(guards)
        self.streak: list[int] = []  # bad steps in a row, up to the last one
        self.passed: set[int] = set()
        self.returns: list[int] = []  # where to, since the last checkpoint beyond the trouble
        self.trouble = -1  # the last bad step that sent the run back
        self._beyond = True  # a step after it was taken
        self._read()

    def begin(self, recent: Iterable[float]) -> None:
        """The run stands at a checkpoint, with its last losses."""
        self.losses = LossHistory(self._guards, recent)
        self.streak = []

    def note(self, step: int, reason: str | None, loss: float) -> None:
        """Step ``step`` was taken, or skipped for a reason."""
        if reason:
            self.streak.append(step)
        else:
            self.streak = []
            self.losses.accept(loss)
            self._beyond |= step > self.trouble

    @property
    def needs_rollback(self) -> bool:
        """True when the run must go back."""
        return 0 < self._guards.rollback_after <= len(self.streak)

    @property
    def can_save(self) -> bool:
        """True where the run's state is worth a checkpoint: not amid bad steps, nor before one is taken that is beyond the trouble."""
        return not self.streak and self._beyond

    def begin_rollback(self) -> int:
        """Pass the streak's steps over from now on; returns the step that the checkpoint to go back to must not be beyond.

        Raises DivergedError where it has been tried often enough.
        """
        first, last = self.streak[0], self.streak[-1]
        if len(self.returns) >= self._guards.max_rollbacks:
            raise DivergedError(
                f"steps {first} to {last} could not be taken, after {len(self.returns)} returns to earlier checkpoints "
                f"(guards.max_rollbacks = {self._guards.max_rollbacks}, guards.rollback_after = {self._guards.rollback_after})"
            )
        self.passed |= set(self.streak)
        self.trouble, self.streak, self._beyond = last, [], False
        return min([first, *(step - 1 for step in self.returns)])

    def record_rollback(self, step: int) -> None:
        """The run stands at a checkpoint's step again."""
        self.returns.append(step)

    def saved(self, step: int) -> None:
        """A checkpoint of ``step`` is begun: beyond the trouble, the returns are forgotten."""
        if step > self.trouble and self._beyond:
            self.returns = []

    def write(self) -> None:
        """Keep what is passed over; a disk that cannot be written is told of, and this process goes on knowing it."""
        tree = {"steps": sorted(self.passed), "returns": self.returns, "trouble": self.trouble}
        try:
            write_text(self._path, json.dumps(tree) + "\n")
        except OSError as error:
            log.warning("%s cannot be written (%s): a restart will not know which batches to pass over", self._path, error)

    def _read(self) -> None:
        try:
            tree = json.loads(self._path.read_text(encoding="utf-8"))
            self.passed = {int(step) for step in tree["steps"]}
            self.returns, self.trouble = [int(step) for step in tree["returns"]], int(tree["trouble"])
            self._beyond = not self.returns
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                [f"{self._path}: cannot be read ({error}); put it right, or delete it to pass no batch over"]
            ) from None
