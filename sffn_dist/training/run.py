"""All that a run consists of on one rank: what the loop, the reporting and the end of the run share."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sffn_dist.checkpoint.store import Saver
from sffn_dist.config import Config
from sffn_dist.data.batches import Batches
from sffn_dist.inference.evaluation import Evaluation
from sffn_dist.parallel.topology import Topology
from sffn_dist.schedule import Schedule
from sffn_dist.telemetry.metrics import MetricsLog
from sffn_dist.telemetry.progress import Estimate, Progress
from sffn_dist.telemetry.trackers import Trackers
from sffn_dist.training.state import Engine


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
    engine: Engine = None
    step: int = 0
    reports: Reports | None = None
    evaluated: dict[int, Evaluation] = field(default_factory=dict)

    @property
    def model(self) -> Any:
        return self.engine.module

    @property
    def dir(self) -> Path:
        return Path(self.config.run.dir)
