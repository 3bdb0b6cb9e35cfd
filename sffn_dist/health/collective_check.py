"""Every kind of collective tried once before a run relies on it: does it give the right values, and how fast
is it?

Bandwidths are counted as nccl-tests count them. With S the bytes of the buffer that has all the ranks' parts
(the result of an all-gather, the input of a reduce-scatter or of an all-to-all) and t the slowest rank's
seconds:

    algorithm bandwidth = S / t          bus bandwidth = S / t x factor

    factor over n ranks:  all-reduce 2 (n-1)/n
                          all-gather, reduce-scatter, all-to-all (n-1)/n
                          broadcast, ring 1

so that the bus bandwidth of a machine is about the same number whatever n is. All functions are called by all
ranks together.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sffn_dist.parallel.object_collectives import all_gather_object

# of a buffer: what fills NVLink, and what gloo moves in some ms
BYTES = {"cuda": 64_000_000, "cpu": 4_000_000}
SECONDS, REPEATS = 0.05, 5  # that one collective is repeated for, and how often at most
PERIOD = 251  # of the values sent: prime, so that a part in another's place has other values

RunCollective = Callable[[], None]
CheckResult = Callable[[], bool]


@dataclass(frozen=True)
class CollectiveResult:
    """One collective over one kind of group.

    ``wrong``: the ranks of the world whose result had wrong values.
    """

    collective: str
    group: str
    ranks: int
    bytes: int
    seconds: float
    wrong: tuple[int, ...]

    @property
    def factor(self) -> float:
        n = self.ranks
        return {"all-reduce": 2 * (n - 1) / n, "broadcast": 1.0, "ring": 1.0}.get(
            self.collective, (n - 1) / n
        )

    @property
    def bus_bandwidth(self) -> float:
        """Bytes/s."""
        return self.bytes / self.seconds * self.factor

    def row(self) -> dict[str, Any]:
        """As it is written to a log."""
        fields = {
            **asdict(self),
            "algorithm_gb_per_s": self.bytes / self.seconds / 1e9,
            "bus_gb_per_s": self.bus_bandwidth / 1e9,
        }
        return {key: value for key, value in fields.items() if key != "wrong"}


class CollectiveError(RuntimeError):
    """A collective could not be done at all; names which, and over which group."""


# ---------------------------------------------------------------------------------------- what each one sends


@dataclass(frozen=True)
class _GroupView:
    """A group as one of its ranks sees it; buffers have n x chunk elements."""

    group: Any
    n: int
    me: int
    chunk: int
    device: torch.device

    def pattern(self, start: int, length: int, add: float = 0.0) -> Tensor:
        """Small whole numbers, whose sums are exact in fp32."""
        return torch.arange(start, start + length, device=self.device).remainder_(PERIOD).float().add_(add)


def _all_reduce(at: _GroupView) -> tuple[RunCollective, CheckResult]:
    buffer = at.pattern(0, at.n * at.chunk, at.me)
    total = at.n * (at.n - 1) / 2

    def right() -> bool:
        good = torch.equal(buffer, at.pattern(0, at.n * at.chunk).mul_(at.n).add_(total))
        buffer.zero_()  # the repeats would add up
        return good

    return lambda: dist.all_reduce(buffer, group=at.group), right


def _all_gather(at: _GroupView) -> tuple[RunCollective, CheckResult]:
    own_data, out = at.pattern(0, at.chunk, at.me), torch.zeros(at.n * at.chunk, device=at.device)
    wanted = at.pattern(0, at.chunk) + torch.arange(at.n, device=at.device)[:, None]
    return lambda: dist.all_gather_into_tensor(out, own_data, group=at.group), lambda: torch.equal(
        out, wanted.view(-1)
    )


def _reduce_scatter(at: _GroupView) -> tuple[RunCollective, CheckResult]:
    whole, out = at.pattern(0, at.n * at.chunk, at.me), torch.zeros(at.chunk, device=at.device)
    wanted = at.pattern(at.me * at.chunk, at.chunk).mul_(at.n).add_(at.n * (at.n - 1) / 2)
    return lambda: dist.reduce_scatter_tensor(out, whole, group=at.group), lambda: torch.equal(out, wanted)


def _all_to_all(at: _GroupView) -> tuple[RunCollective, CheckResult]:
    whole, out = at.pattern(0, at.n * at.chunk, at.me), torch.zeros(at.n * at.chunk, device=at.device)
    wanted = at.pattern(at.me * at.chunk, at.chunk) + torch.arange(at.n, device=at.device)[:, None]
    return lambda: dist.all_to_all_single(out, whole, group=at.group), lambda: torch.equal(
        out, wanted.view(-1)
    )


def _broadcast(at: _GroupView) -> tuple[RunCollective, CheckResult]:
    buffer = at.pattern(0, at.n * at.chunk, 7.0 if at.me == 0 else -at.me)
    wanted = at.pattern(0, at.n * at.chunk, 7.0)
    first = dist.get_global_rank(at.group, 0)
    return lambda: _done(dist.broadcast(buffer, src=first, group=at.group)), lambda: torch.equal(
        buffer, wanted
    )


def _ring(at: _GroupView) -> tuple[RunCollective, CheckResult]:
    """Each rank sends to the next one and receives from the one before, all at once."""
    own_data, out = at.pattern(0, at.n * at.chunk, at.me), torch.zeros(at.n * at.chunk, device=at.device)
    previous, following = (at.me - 1) % at.n, (at.me + 1) % at.n
    peers = [dist.get_global_rank(at.group, peer) for peer in (previous, following)]

    def run() -> None:
        pair = [
            dist.P2POp(dist.irecv, out, peers[0], at.group),
            dist.P2POp(dist.isend, own_data, peers[1], at.group),
        ]
        for work in dist.batch_isend_irecv(pair):
            work.wait()

    return run, lambda: torch.equal(out, at.pattern(0, at.n * at.chunk, previous))


def _done(_: object) -> None:
    return None


KINDS: dict[str, Callable[[_GroupView], tuple[RunCollective, CheckResult]]] = {
    "all-reduce": _all_reduce,
    "all-gather": _all_gather,
    "reduce-scatter": _reduce_scatter,
    "all-to-all": _all_to_all,
    "broadcast": _broadcast,
    "ring": _ring,
}
INNER = ("all-reduce", "all-gather")  # tried over the groups inside the world too


# ----------------------------------------------------------------------------------------------------- trying


def check_collectives(
    groups: Mapping[str, Any], device: torch.device, size: int | None = None
) -> tuple[list[CollectiveResult], list[float]]:
    """(trials, bytes/s of each link of the ring) over "world" and the other groups given, those of one rank
    left out.

    Link r of the ring goes from rank r - 1 to rank r. A rank's exchange lasts as long as the slower of its
    two links, so a link is as fast as the faster of the two ranks that it joins. Raises CollectiveError on a
    rank where a collective fails outright.
    """
    size, timings, plan = size or BYTES[device.type], [], []
    for name, group in groups.items():
        n = dist.get_world_size(group)
        if n == 1:
            continue
        for collective in KINDS if name == "world" else INNER:
            at = _GroupView(group, n, dist.get_rank(group), max(1, size // 4 // n), device)
            plan.append((collective, name, n, 4 * n * at.chunk))
            try:
                timings.append(_timed(*KINDS[collective](at), device))
            except RuntimeError as error:
                raise CollectiveError(f"{collective} over the {name} group of {n} ranks: {error}") from error
    if not plan:
        return [], []
    gathered = all_gather_object(timings)
    trials = [
        CollectiveResult(
            *planned,
            max(rank_timings[i][0] for rank_timings in gathered),
            tuple(r for r, rank_timings in enumerate(gathered) if not rank_timings[i][1]),
        )
        for i, planned in enumerate(plan)
    ]
    ring = next(i for i, planned in enumerate(plan) if planned[:2] == ("ring", "world"))
    own = [rank_timings[ring][0] for rank_timings in gathered]
    return trials, [plan[ring][3] / min(own[rank - 1], own[rank]) for rank in range(len(own))]


def _timed(run: RunCollective, right: CheckResult, device: torch.device) -> tuple[float, bool]:
    """This rank's median seconds, and whether the first result was right.

    The first run makes connections and is not timed.
    """
    run()
    good, seconds = right(), [_once(run, device)]
    longest = torch.tensor(seconds[0], device=device)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX)  # all repeat equally often
    for _ in range(min(REPEATS, int(SECONDS / max(float(longest), 1e-6)))):
        seconds.append(_once(run, device))
    return statistics.median(seconds), good


def _once(run: RunCollective, device: torch.device) -> float:
    _barrier(device)
    began = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _barrier(device: torch.device) -> None:
    """Nobody leaves before all have come."""
    torch_sum = torch.ones((), device=device)
    dist.all_reduce(torch_sum)
    torch_sum.item()


# ----------------------------------------------------------------------------------------------------- clocks


def clocks(
    device: torch.device, now: Callable[[], float] = time.time, rounds: int = 3
) -> list[tuple[float, float]]:
    """(seconds by which each rank's clock is ahead of rank 0's, error at most), by rank.

    The moment at which the last rank comes to a meeting lies, for each rank r, between its reading a_r before
    and b_r after it. So r is ahead of rank 0 by at least a_r - b_0 and at most b_r - a_0; of some rounds the
    narrowest bounds are taken.
    """
    readings: list[Tensor] = []
    for _ in range(rounds + 1):  # the first one brings the ranks together
        before = now()
        _barrier(device)
        pair = torch.tensor([before, now()], dtype=torch.float64, device=device)
        both = torch.empty(dist.get_world_size() * 2, dtype=torch.float64, device=device)
        dist.all_gather_into_tensor(both, pair)
        readings.append(both.view(-1, 2).cpu())
    bounds = [(table[:, 0] - table[0, 1], table[:, 1] - table[0, 0]) for table in readings[1:]]
    low, high = (torch.stack(side) for side in zip(*bounds, strict=True))
    best = (high - low).argmin(0)
    low, high = low.gather(0, best[None])[0], high.gather(0, best[None])[0]
    return [(float(a + b) / 2, float(b - a) / 2) for a, b in zip(low, high, strict=True)]


def slow_links(
    rates: Sequence[float], hosts: Sequence[str], below: float = 0.5
) -> list[tuple[list[int], float, float]]:
    """(ranks, the faster of its links, median of the others') of each node whose links all are slower than
    ``below`` times the others.

    ``rates[r]``: bytes/s from rank r - 1 to rank r. Between nodes these are the links that leave it; where
    all ranks are on one node, each rank stands for itself. With fewer than three no two links show whose
    fault they are.
    """
    world = len(rates)
    members: dict[Any, list[int]] = {}
    alone = len(set(hosts)) == 1
    for rank in range(world):
        members.setdefault(rank if alone else hosts[rank], []).append(rank)
    owner = {rank: name for name, ranks in members.items() for rank in ranks}
    links = [(owner[(rank - 1) % world], owner[rank], rates[rank]) for rank in range(world)]
    links = [link for link in links if link[0] != link[1]]
    slow_nodes = []
    for name, ranks in members.items():
        own = [rate for a, b, rate in links if name in (a, b)]
        others = [rate for a, b, rate in links if name not in (a, b)]
        if own and others and max(own) < below * statistics.median(others):
            slow_nodes.append((ranks, max(own), statistics.median(others)))
    return slow_nodes
