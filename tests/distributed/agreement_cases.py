"""What ranks know alike; called inside the ranks of a pool."""

from __future__ import annotations

import os
import signal
import time

import torch

from sffn_dist.launch.signals import SignalHandler
from sffn_dist.parallel import topology
from sffn_dist.parallel.topology import Topology
from sffn_dist.training.step_agreement import StepAgreement, agree_on_step


def _here() -> Topology:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    topology.init_process_group()
    return Topology(rank, world, 1, 0, world, rank, torch.device("cpu"), None, None)


def agreed(
    losses: list[tuple[float, float]], told: list[tuple[str | None, str | None]]
) -> list[tuple[float, str | None, bool]]:
    """By step: the mean loss, the signal and whether a report is due, where each rank has its own loss and
    was sent its own signal.
    """
    here, found = _here(), []
    for loss, names in zip(losses, told, strict=True):
        signals = SignalHandler()
        signals.catch()
        signals.defer(25.0)
        try:
            name = names[here.rank]
            if name:
                os.kill(os.getpid(), signal.Signals[name])
            first = agree_on_step(loss[here.rank], signals, here)
            assert not signals.report_wanted
            found.append((first.loss, first.stop.name if first.stop else None, first.report))
        finally:
            signals.release()
    return found


def waited(seconds: float) -> tuple[float, bool]:
    """How long each rank waited for rank 1, and a report that rank 0's caller asks for."""
    here = _here()
    agree_on_step(0.0, SignalHandler(), here)
    time.sleep(seconds if here.rank else 0.0)
    found: StepAgreement = agree_on_step(0.0, SignalHandler(), here, report=here.rank == 0)
    return found.waited, found.report
