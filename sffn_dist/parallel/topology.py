"""Which rank this is and which groups it belongs to: world = data x tensor, tensor-parallel ranks
adjacent.
"""

from __future__ import annotations

import datetime
import math
import os
import socket
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from sffn_kernels import dispatch
from torch._C._distributed_c10d import PrefixStore

from sffn_dist.parallel import cpu_compat, rendezvous
from sffn_dist.parallel.object_collectives import all_gather_object
from sffn_dist.spec import machine
from sffn_dist.spec.config import Config, ConfigError
from sffn_dist.spec.validation import check_world

TIMEOUT = 1800.0  # seconds that a collective may take, at least


@dataclass(frozen=True)
class Topology:
    """Ranks and groups of this process."""

    rank: int
    world_size: int
    tensor_parallel_size: int
    tensor_parallel_rank: int
    data_parallel_size: int
    data_parallel_rank: int
    device: torch.device
    tensor_group: Any
    data_group: Any

    @property
    def is_rank_zero(self) -> bool:
        return self.rank == 0

    def background_group(self) -> Any:
        """A gloo group of all ranks for threads beside the training's; made once.

        All ranks must call it at the same place.
        """
        if not _background:
            # hours: ranks' disks may differ by that much, and what hangs is seen by the training's own groups
            _background.append(dist.new_group(backend="gloo", timeout=datetime.timedelta(hours=12)))
        return _background[0]


_background: list[Any] = []


class ModelParallelUnit:
    """``megatron.core.parallel_state`` as DeepSpeed's ``mpu``, with the older names that DeepSpeed also
    asks for.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(parallel_state, name)

    def get_model_parallel_world_size(self) -> int:
        return parallel_state.get_tensor_model_parallel_world_size()

    def get_model_parallel_rank(self) -> int:
        return parallel_state.get_tensor_model_parallel_rank()

    def get_model_parallel_group(self) -> Any:
        return parallel_state.get_tensor_model_parallel_group()


def init_parallel(config: Config) -> Topology:
    """Join the process group, and make Megatron's groups."""
    timeout = collective_timeout(config)
    init_process_group(timeout)
    check_world(config, dist.get_world_size())
    return groups(config.parallel.tensor, timeout)


def collective_timeout(config: Config) -> float:
    """Seconds that a collective of any group may take: the watchdog says first who is missing."""
    return max(TIMEOUT, 2 * config.guards.hang_seconds)


def init_process_group(timeout: float = TIMEOUT) -> Any:
    """Join the process group that the launcher describes (RANK, WORLD_SIZE, ...), or be alone.

    Returns the rendezvous store.

    ``timeout``: seconds that a collective may take. Raises ConfigError where ranks do not find each other.
    """
    cpu_compat.prepare()
    if dist.is_initialized():
        return dist.distributed_c10d._get_default_store()
    if "RANK" not in os.environ:
        os.environ.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"})
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = rendezvous.connect(rank, world)
    backend, limit = "nccl" if cpu_compat.has_cuda() else "gloo", datetime.timedelta(seconds=timeout)
    dist.init_process_group(
        backend,
        store=PrefixStore("group", store),
        rank=rank,
        world_size=world,
        timeout=limit,
        # NCCL then connects here, where a node that cannot is named, and guesses no device at a barrier
        device_id=cpu_compat.device() if backend == "nccl" else None,
    )
    _set_threads()
    return store


def rank_and_world() -> tuple[int, int]:
    """This rank and how many there are, once the process group is joined."""
    return dist.get_rank(), dist.get_world_size()


def groups(tensor: int, timeout: float = TIMEOUT) -> Topology:
    """Megatron's groups over the processes there are, whose collectives may take ``timeout`` seconds.

    Made anew only if the tensor-parallel size is another one.
    """
    initialized = parallel_state.model_parallel_is_initialized()
    if initialized and parallel_state.get_tensor_model_parallel_world_size() != tensor:
        parallel_state.destroy_model_parallel()
        initialized = False
    if not initialized:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tensor,
            create_gloo_process_groups=False,
            distributed_timeout_minutes=math.ceil(timeout / 60),
        )
    return Topology(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tensor_parallel_size=tensor,
        tensor_parallel_rank=parallel_state.get_tensor_model_parallel_rank(),
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        device=cpu_compat.device(),
        tensor_group=parallel_state.get_tensor_model_parallel_group(),
        data_group=parallel_state.get_data_parallel_group(),
    )


def require_equal(facts: dict[str, Any]) -> None:
    """Compare ``facts`` between all ranks; raises ConfigError on every rank where nodes differ.

    Each rank finds them by itself, and a folder that is not shared, another Python or another processor would
    split the run silently.
    """
    by_rank = all_gather_object((socket.gethostname(), facts))
    problems = []
    for key, value in by_rank[0][1].items():
        other = next(((hostname, values[key]) for hostname, values in by_rank if values[key] != value), None)
        if other:
            problems.append(
                f"ranks disagree: {key} is {value!r} on {by_rank[0][0]} and {other[1]!r} on {other[0]}"
            )
    if problems:
        raise ConfigError(problems)


def destroy() -> None:
    """Leave the groups and the process group."""
    _background.clear()
    dispatch.agree_by(None)
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def _set_threads() -> None:
    """Share the cores among a node's ranks, unless the user said otherwise: oversubscribed ranks crawl."""
    if "OMP_NUM_THREADS" not in os.environ:
        places = all_gather_object((socket.gethostname(), machine.core_set()))
        torch.set_num_threads(machine.core_shares(places)[dist.get_rank()])
