"""What all ranks have before a step's update is made: the mean loss, and whether a rank was signalled or
asked for a report.

One all-reduce of a few numbers a step, where the loss is read anyway. Everything that is decided during a run
(skip this step, stop, roll back) is a function of these and of the losses before, which are in the
checkpoints, so all ranks decide the same.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from sffn_dist.launch import exit_codes
from sffn_dist.launch.signals import STOP_SIGNALS, SignalHandler, Stop
from sffn_dist.parallel.topology import Topology


@dataclass(frozen=True)
class StepAgreement:
    """The same on every rank, but for ``waited`` and the name of ``stop``."""

    loss: float  # nats, mean over the step's tokens
    stop: Stop | None = None
    report: bool = False
    minutes: float = 0.0  # that the run has been training since its start, mean over the ranks
    waited: float = 0.0  # seconds that this rank waited for the others
    skip_reason: str | None = None  # why no update is made on this loss


def agree_on_step(
    loss: float, signals: SignalHandler, topology: Topology, *, report: bool = False, minutes: float = 0.0
) -> StepAgreement:
    """Join what every rank has; ``loss`` is the mean over the rank's own sequences.

    All ranks must call it.
    """
    report = report or signals.report_wanted
    signals.report_wanted = False
    started = time.perf_counter()
    facts = [
        loss / topology.world_size,
        float(report),
        minutes / topology.world_size,
        *(float(signals.received == number) for number in STOP_SIGNALS),
    ]
    if topology.world_size > 1:
        shared = torch.tensor(facts, dtype=torch.float64, device=topology.device)
        dist.all_reduce(shared)
        facts = shared.tolist()
    number = next((number for number, count in zip(STOP_SIGNALS, facts[3:], strict=True) if count), None)
    stop = None
    if number is not None:
        name = signals.cause if signals.received == number else number.name
        stop = Stop(name, exit_codes.for_signal(number))
    return StepAgreement(facts[0], stop, bool(facts[1]), facts[2], time.perf_counter() - started)
