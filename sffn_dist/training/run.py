"""All that a run consists of on one rank: what the loop, its hooks and the end of the run share."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sffn_dist.checkpoint.writer import Saver
from sffn_dist.data.batches import Batches
from sffn_dist.data.prefetch import Prefetch
from sffn_dist.data.shards import HeldoutSample
from sffn_dist.health import stragglers
from sffn_dist.health.stragglers import StepTimers
from sffn_dist.health.watchdog import Watchdog
from sffn_dist.inference.evaluation import EvaluationResult
from sffn_dist.launch.signals import SignalHandler
from sffn_dist.parallel.topology import Topology
from sffn_dist.spec.config import Config
from sffn_dist.spec.schedule import Schedule
from sffn_dist.training import engine as engines
from sffn_dist.training.bad_steps import BadSteps
from sffn_dist.training.engine_state import Engine
from sffn_dist.training.interruption import Interruption
from sffn_dist.training.reports import Reports


@dataclass
class TrainingRun:
    """All of a run on this rank; ``step`` is the next step to take.

    ``engine`` has no other owner: at a phase boundary and by a rollback it is replaced
    (:meth:`replace_engine`), and must be free to go.
    """

    config: Config
    precision: str
    schedule: Schedule
    topology: Topology
    batches: Batches
    heldout: HeldoutSample
    data_fingerprint: str
    saver: Saver
    bad_steps: BadSteps
    engine: Engine
    step: int
    reports: Reports | None = None  # rank 0's
    watchdog: Watchdog = field(default_factory=Watchdog)
    signals: SignalHandler = field(default_factory=SignalHandler)
    interruption: Interruption = field(default_factory=Interruption)
    evaluated: dict[int, EvaluationResult] = field(default_factory=dict)
    steps_taken: int = 0  # in this process
    began: float = field(default_factory=time.monotonic)
    start_step: int = field(init=False)
    timers: StepTimers = field(init=False)
    prefetch: Prefetch = field(init=False)
    _asked: float = -math.inf  # when rank 0 last looked for a request, by the monotonic clock

    def __post_init__(self) -> None:
        self.start_step = self.step
        self.timers = StepTimers(self.topology.device)
        self.prefetch = Prefetch(self.topology.device)

    @property
    def model(self) -> Any:
        return self.engine.module

    @property
    def dir(self) -> Path:
        return Path(self.config.run.dir)

    def replace_engine(self, build: Callable[[], Engine]) -> None:
        """Free the engine and its model, then make the new one: both never exist at once.

        All ranks must call it.
        """
        engines.destroy(self.engine)
        self.engine = None
        engines.free_memory(self.topology.device)
        self.engine = build()

    def rewind(self, step: int) -> None:
        """The run stands at an earlier step, with its engine: what was evaluated and reported after it is
        forgotten.
        """
        self.step = step
        self.evaluated = {at: result for at, result in self.evaluated.items() if at <= step}
        if self.reports:
            self.reports.rewind(step)

    def tell(self, event: str, text: str, **facts: Any) -> None:
        """Something that happened at the current step: a line for the reader, a row of events.jsonl, word
        to the trackers.
        """
        if self.reports:
            self.reports.event(event, self.step, text, **facts)

    def report_requested(self) -> bool:
        """Whether rank 0 is asked for a report of all ranks, by a file in run.dir.

        Looked for every two seconds at most.
        """
        now = time.monotonic()
        if not self.topology.is_rank_zero or now - self._asked < 2.0:
            return False
        self._asked = now
        return stragglers.requested(self.dir)
