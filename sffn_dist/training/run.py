"""All that a run consists of on one rank: what the loop, the reporting and the end of the run share."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sffn_dist.checkpoint.writer import Saver
from sffn_dist.data.batches import Batches
from sffn_dist.health import stragglers
from sffn_dist.health.stragglers import Recorder
from sffn_dist.health.watchdog import Watchdog
from sffn_dist.inference.evaluation import Evaluation
from sffn_dist.launch.signals import SignalHandler
from sffn_dist.parallel.topology import Topology
from sffn_dist.spec.config import Config
from sffn_dist.spec.schedule import Schedule
from sffn_dist.telemetry.events import EventLog
from sffn_dist.telemetry.metrics import MetricsLog
from sffn_dist.telemetry.progress import Estimate, Progress
from sffn_dist.telemetry.trackers import Trackers
from sffn_dist.training.bad_steps import BadSteps
from sffn_dist.training.engine_state import Engine


@dataclass
class Heldout:
    """What evaluations need: (n, S+1) windows and the bytes of every token id."""

    windows: NDArray[np.int64]
    token_bytes: NDArray[Any]


@dataclass
class Reports:
    """Where a rank reports to; only rank 0 has these."""

    metrics: MetricsLog
    evaluations: MetricsLog
    trackers: Trackers
    progress: Progress
    estimate: Estimate
    events: EventLog
    flops_per_step: int  # without the guide
    guide_flops_per_step: int  # when every guide is computed

    def close(self) -> None:
        """End the progress line and close the logs; the trackers finish with the summary."""
        self.progress.close()
        self.metrics.close()
        self.evaluations.close()


@dataclass
class Run:
    """All of a run on this rank; ``step`` is the next step to take.

    ``engine`` has no other owner: at a phase boundary it is replaced, and must be free to go.
    """

    config: Config
    precision: str
    schedule: Schedule
    topology: Topology
    batches: Batches
    heldout: Heldout
    data_fingerprint: str
    saver: Saver
    bad_steps: BadSteps
    signals: SignalHandler = field(default_factory=SignalHandler)
    watch: Watchdog = field(default_factory=Watchdog)
    engine: Engine = None
    step: int = 0
    reports: Reports | None = None
    evaluated: dict[int, Evaluation] = field(default_factory=dict)
    save_pending: bool = False  # one was due amid bad steps
    recorder: Recorder = field(init=False)
    asked: float = -math.inf  # when rank 0 last looked for a request, by the monotonic clock

    def __post_init__(self) -> None:
        self.recorder = Recorder(self.topology.device)

    @property
    def model(self) -> Any:
        return self.engine.module

    @property
    def dir(self) -> Path:
        return Path(self.config.run.dir)

    def tell(self, event: str, text: str, **facts: Any) -> None:
        """Something that happened to the run at its current step: a line for the reader, a row of events.jsonl, word to the trackers."""
        if self.reports:
            self.reports.progress.note(text)
            row = self.reports.events.write(event, self.step, message=text, **facts)
            self.reports.trackers.event(row)

    def report_requested(self) -> bool:
        """Whether somebody asks rank 0 for a report of all ranks, by a file in run.dir; looked for every two seconds at most."""
        now = time.monotonic()
        if not self.topology.main or now - self.asked < 2.0:
            return False
        self.asked = now
        return stragglers.requested(self.dir)
