"""Before the first step: do all ranks agree, does every collective give the right values, whose clock, device
or link is off?

    facts = check_ranks(config, precision)     once the process group is joined, before any data are prepared:
                                               may refuse
    report = run(facts, topology, precision)   once there are Megatron's groups: may refuse; names who is slow

Refused is what would make a wrong model or a run that cannot be saved; what only costs time is a warning.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sffn_dist.health import collective_check, consistency
from sffn_dist.health.collective_check import CollectiveResult
from sffn_dist.health.consistency import name_ranks
from sffn_dist.health.watchdog import Watchdog
from sffn_dist.parallel import topology
from sffn_dist.parallel.object_collectives import all_gather_object
from sffn_dist.parallel.topology import Topology
from sffn_dist.spec import machine
from sffn_dist.spec.config import Config, ConfigError
from sffn_dist.spec.config_keys import flatten
from sffn_dist.telemetry.peak import measured_flops

CLOCK_SECONDS = 5.0  # beyond which logs and events of nodes do not line up
SLOW_COMPUTE, SLOW_LINK = 0.7, 0.5  # of the median
PRODUCT_SECONDS = 0.1


@dataclass(frozen=True)
class RankFacts:
    """What all ranks have of each other."""

    hosts: tuple[str, ...]  # by rank
    device: str  # rank 0's
    warnings: tuple[str, ...] = ()

    def report(self, backend: str = "") -> PreflightReport:
        """A report of nothing but this."""
        return PreflightReport(self.hosts, backend, self.device, warnings=list(self.warnings))


@dataclass
class PreflightReport:
    """What the pre-flight found: the same on every rank."""

    hosts: tuple[str, ...]
    backend: str
    device: str
    trials: list[CollectiveResult] = field(default_factory=list)
    flops: list[float] = field(default_factory=list)  # FLOP/s of matrix products, by rank
    links: list[float] = field(default_factory=list)  # bytes/s from rank r - 1 to r
    clocks: list[tuple[float, float]] = field(default_factory=list)  # seconds ahead of rank 0, error; by rank
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def slowest(self) -> int:
        """The rank with the least FLOP/s."""
        return min(range(len(self.flops)), key=self.flops.__getitem__)

    @property
    def fastest(self) -> int:
        return max(range(len(self.flops)), key=self.flops.__getitem__)

    def row(self) -> dict[str, Any]:
        """For the run's events."""
        return {
            "world": len(self.hosts),
            "nodes": len(set(self.hosts)),
            "backend": self.backend,
            "device": self.device,
            "collectives": [trial.row() for trial in self.trials],
            "tflops": [rate / 1e12 for rate in self.flops],
            "link_gb_per_s": [rate / 1e9 for rate in self.links],
            "clock_seconds": [offset for offset, _ in self.clocks],
            "warnings": self.warnings,
            "seconds": self.seconds,
        }

    def text(self) -> str:
        """The table that rank 0 prints, and the warnings."""
        world, nodes = len(self.hosts), len(set(self.hosts))
        right = f"{len(self.trials)} collectives right, " if self.trials else ""
        lines = [
            f"pre-flight: {world} rank{'s' * (world > 1)} on {nodes} node{'s' * (nodes > 1)}, "
            f"{self.backend}, {self.device}: "
            f"{right}{self.seconds:.1f} s"
        ]
        if self.trials:
            lines.append(f"  {'collective':<16}{'group':<8}{'ranks':>6}{'MB':>8}{'ms':>9}{'bus GB/s':>10}")
        for trial in self.trials:
            lines.append(
                f" "
                f" "
                f"{trial.collective:<16}{trial.group:<8}{trial.ranks:>6}"
                f"{trial.bytes / 1e6:>8.3g}{trial.seconds * 1e3:>9.3g}"
                f"{trial.bus_bandwidth / 1e9:>10.3g}"
            )
        if self.flops:
            low, high = self.slowest, self.fastest
            lines.append(
                f"  matrix products, TFLOP/s a rank: median {statistics.median(self.flops) / 1e12:.3g}, "
                f"slowest {self.flops[low] / 1e12:.3g} on {name_ranks([low], self.hosts)}, "
                f"fastest {self.flops[high] / 1e12:.3g} on {name_ranks([high], self.hosts)}"
            )
        return "\n".join(lines + [f"warning: {warning}" for warning in self.warnings])


def preflight_only(config: Config, watch: Watchdog) -> None:
    """The pre-flight and nothing else, for ``pretrain.py --preflight``; rank 0 prints the table.

    Raises as the parts do.
    """
    precision, run_dir, created = machine.precision(config.precision), Path(config.run.dir), False
    store = topology.init_process_group(topology.collective_timeout(config))
    main = dist.get_rank() == 0
    if main and not run_dir.exists():
        with contextlib.suppress(OSError):  # check_shared_folder reports it
            run_dir.mkdir(parents=True)
            created = True
    try:
        agreed, rank_topology = check_ranks(config, precision), topology.init_parallel(config)
        watch.start(store, rank_topology.rank, rank_topology.world_size, config.guards, run_dir)
        report = measure(agreed, rank_topology, precision)
        watch.stop()
        if main:
            print(report.text(), flush=True)
    finally:
        if created:
            with contextlib.suppress(OSError):
                run_dir.rmdir()
    topology.destroy()


def check_ranks(config: Config, precision: str) -> RankFacts:
    """Versions, code, config, precision and kind of device are the same on all ranks, and all share run.dir.

    Raises ConfigError on every rank: what differs, its values and who has them; or who does not see run.dir.
    """
    own_facts = consistency.facts(config, precision)
    hosts, warnings = consistency.check_consistency(own_facts, flatten(config))
    consistency.check_shared_folder(Path(config.run.dir), hosts)
    return RankFacts(tuple(hosts), own_facts[consistency.DEVICE], tuple(warnings))


def run(facts: RankFacts, topology: Topology, precision: str, *, measures: bool) -> PreflightReport:
    """The pre-flight of a run: collectives, clocks and speed where ``measures`` and there are several ranks.

    All ranks must call it.
    """
    return measure(facts, topology, precision) if measures and topology.world_size > 1 else facts.report()


def measure(
    agreed: RankFacts,
    topology: Topology,
    precision: str,
    *,
    now: Callable[[], float] = time.time,
    rate: Callable[[torch.device, str, float], float] = measured_flops,
) -> PreflightReport:
    """Collectives, clocks and speed of all ranks, which all call it; under 2 s on two CPU ranks.

    ``now`` reads the wall clock, ``rate`` measures FLOP/s of matrix products. Raises ConfigError on every
    rank where a collective's result is wrong, naming it and the ranks that had it wrong;
    collective_check.CollectiveError where one fails outright.
    """
    began, device = time.perf_counter(), topology.device
    report = agreed.report(dist.get_backend() if dist.is_initialized() else "no process group")
    if topology.world_size > 1:
        groups = {"world": dist.group.WORLD, "tensor": topology.tensor_group, "data": topology.data_group}
        report.trials, report.links = collective_check.check_collectives(groups, device)
        report.clocks = collective_check.clocks(device, now)
    for _ in range(2):
        rates = all_gather_object(rate(device, precision, PRODUCT_SECONDS))
        report.flops = [max(pair) for pair in zip(rates, report.flops or rates, strict=True)]
        if not slow(report.flops):
            break  # else it is given a second chance: something else may have run there for a moment
    if device.type == "cuda":
        torch.cuda.empty_cache()
    report.seconds = time.perf_counter() - began
    if wrong := [
        f"pre-flight: {trial.collective} over the {trial.group} group gives wrong values on "
        f"{name_ranks(trial.wrong, agreed.hosts)}"
        for trial in report.trials
        if trial.wrong
    ]:
        raise ConfigError(wrong)
    report.warnings += _late_clocks(report) + _slow(report)
    return report


def _late_clocks(report: PreflightReport) -> list[str]:
    """One line for each node whose clock is surely off, by its first rank."""
    hosts, warnings = report.hosts, []
    for name in dict.fromkeys(hosts):
        offset, error = report.clocks[hosts.index(name)] if report.clocks else (0.0, 0.0)
        if abs(offset) - error > CLOCK_SECONDS:
            side = "ahead of" if offset > 0 else "behind"
            warnings.append(
                f"the clock of {name} is {abs(offset):.1f} s {side} that of {hosts[0]}: their logs and "
                f"events do not line up"
            )
    return warnings


def _slow(report: PreflightReport) -> list[str]:
    hosts, warnings = report.hosts, []
    usual = statistics.median_high(report.flops)
    for rank in slow(report.flops):
        warnings.append(
            f"slow: {name_ranks([rank], hosts)} multiplies matrices at {report.flops[rank] / 1e12:.3g} "
            f"TFLOP/s, "
            f"{report.flops[rank] / usual:.2f} x the median of {usual / 1e12:.3g}; all wait for it in every "
            f"step"
        )
    for ranks, best, others in collective_check.slow_links(report.links, hosts, SLOW_LINK):
        warnings.append(
            f"slow links: {name_ranks(ranks, hosts)} sends and receives at {best / 1e9:.3g} GB/s at most, "
            f"{best / others:.2f} x what is usual "
            f"between the others, {others / 1e9:.3g}"
        )
    return warnings


def slow(rates: Sequence[float], below: float = SLOW_COMPUTE) -> list[int]:
    """Ranks whose rate is under ``below`` times the median, the upper one of an even number: of two, the
    faster rank's.
    """
    if not rates:
        return []
    usual = statistics.median_high(rates)
    return [rank for rank, rate in enumerate(rates) if rate < below * usual]
