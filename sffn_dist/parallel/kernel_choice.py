"""Which kernels a run uses, alike on every rank: replicas that computed with different ones would drift
apart.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from sffn_kernels import dispatch
from sffn_kernels.choices import KernelChoice

from sffn_dist.parallel.object_collectives import all_gather_object, broadcast_object
from sffn_dist.parallel.topology import Topology


def start(setting: str, topology: Topology) -> None:
    """Use ``setting`` (auto, torch or triton).

    Where kernels are timed, all ranks time at once; the first rank's table and the mean of all times decide.

    Every rank comes to the same operations on the same sizes in the same order, so each such sum is met by
    all. Raises RuntimeError if Triton is asked for and cannot run.
    """
    dispatch.use(setting)
    if topology.world_size == 1 or topology.device.type != "cuda":
        dispatch.agree_by(None)
        return
    if any(
        all_gather_object(dispatch.unavailable(topology.device))
    ):  # on one node is on all: a rank that only ran torch would not meet the others' sums
        dispatch.use("torch")
        return

    def mean(times: list[float]) -> list[float]:
        summed = torch.tensor(times, device=topology.device)
        dist.all_reduce(summed)
        dist.broadcast(summed, src=0)  # the same bits on all ranks, in whatever order each of them summed
        return [time / topology.world_size for time in summed.tolist()]

    def meet() -> None:
        dist.all_reduce(torch.zeros(1, device=topology.device))

    def first(table: dict[str, KernelChoice]) -> dict[str, KernelChoice]:
        return dict(broadcast_object(table, device=topology.device))

    dispatch.agree_by(mean, meet=meet, writes=topology.is_rank_zero)
    dispatch.shared_table(topology.device, first)
