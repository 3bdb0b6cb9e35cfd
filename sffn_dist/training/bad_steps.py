"""Steps whose update must not be made, and when several in a row send the run back to a checkpoint.

    one        skipped: a loss that is not finite or a spike (loss_spikes.py), a gradient that is not finite
    several    guards.rollback_after in a row: the run is rolled back to its newest checkpoint from before the
               first of them, and their batches are excluded from then on; a second rollback
               without progress goes one checkpoint further back
    again      after guards.max_rollbacks rollbacks without a checkpoint beyond the last bad step the run
               stops

Excluded batches are part of the run: ``run_dir/passed_over.json``, read at every start. An excluded batch is
not computed and has no loss; the schedule goes on without it. No save falls due between bad steps; a stop
signal and the run's last step save there all the same.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path

from sffn_dist import strict_json
from sffn_dist.atomic_io import write_text
from sffn_dist.launch import exit_codes
from sffn_dist.spec.config import ConfigError, Guards
from sffn_dist.training.loss_spikes import LossHistory

log = logging.getLogger(__name__)
NAME = "passed_over.json"


class DivergedError(RuntimeError):
    """The run does not get beyond some step, though it was rolled back and the batches there were skipped."""

    exit_code = exit_codes.DIVERGED


class BadSteps:
    """The same on every rank, by the same losses."""

    def __init__(self, guards: Guards, run_dir: Path):
        self._guards, self._path = guards, run_dir / NAME
        self.losses = LossHistory(guards)
        self.consecutive: list[int] = []  # bad steps in a row, up to the last one
        self.excluded: set[int] = set()
        # steps that were returned to, since the last checkpoint beyond last_bad_step
        self.rollbacks: list[int] = []
        self.last_bad_step = -1  # the last bad step that sent the run back
        self._beyond = True  # a step after it was taken
        self._read()

    def reset(self, recent: Iterable[float]) -> None:
        """The run stands at a checkpoint, with its last losses."""
        self.losses = LossHistory(self._guards, recent)
        self.consecutive = []

    def record(self, step: int, reason: str | None, loss: float) -> None:
        """Step ``step`` was taken, or skipped for a reason."""
        if reason:
            self.consecutive.append(step)
        else:
            self.consecutive = []
            self.losses.accept(loss)
            self._beyond |= step > self.last_bad_step

    @property
    def needs_rollback(self) -> bool:
        """True when the run must go back."""
        return 0 < self._guards.rollback_after <= len(self.consecutive)

    @property
    def can_save(self) -> bool:
        """False between bad steps, and after a rollback until a step beyond the last bad one is taken."""
        return not self.consecutive and self._beyond

    def begin_rollback(self) -> int:
        """Exclude the batches of the bad steps in a row from now on.

        Returns the step that the checkpoint to go back to must not be beyond.

        Raises DivergedError where it has been tried often enough.
        """
        first, last = self.consecutive[0], self.consecutive[-1]
        if len(self.rollbacks) >= self._guards.max_rollbacks:
            raise DivergedError(
                f"steps {first} to {last} were bad again after {len(self.rollbacks)} rollbacks "
                f"(guards.max_rollbacks = {self._guards.max_rollbacks}, guards.rollback_after = "
                f"{self._guards.rollback_after}): lower train.learning_rate, look at these steps' data, "
                "or raise guards.max_rollbacks"
            )
        self.excluded |= set(self.consecutive)
        self.last_bad_step, self.consecutive, self._beyond = last, [], False
        return min([first, *(step - 1 for step in self.rollbacks)])

    def record_rollback(self, step: int) -> None:
        """The run stands at a checkpoint's step again."""
        self.rollbacks.append(step)

    def record_save(self, step: int) -> None:
        """A checkpoint of ``step`` is begun: beyond the last bad step, rollbacks are counted anew."""
        if step > self.last_bad_step and self._beyond:
            self.rollbacks = []

    def write(self) -> None:
        """Record the excluded batches; where the disk cannot be written, this process still knows them."""
        tree = {"steps": sorted(self.excluded), "returns": self.rollbacks, "trouble": self.last_bad_step}
        try:
            write_text(self._path, strict_json.dumps(tree) + "\n")
        except OSError as error:
            log.warning(
                "%s cannot be written (%s): a restart will not know which batches are excluded",
                self._path,
                error,
            )

    def _read(self) -> None:
        try:
            tree = json.loads(self._path.read_text(encoding="utf-8"))
            self.excluded = {int(step) for step in tree["steps"]}
            self.rollbacks, self.last_bad_step = [int(step) for step in tree["returns"]], int(tree["trouble"])
            self._beyond = not self.rollbacks
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                [f"{self._path}: cannot be read ({error}); put it right, or delete it to exclude no batch"]
            ) from None
