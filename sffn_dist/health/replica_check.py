"""Do ranks that should hold the same weights hold the same bits? A device that computes wrongly, or a lost
sum, shows nowhere else.

Compared are, by a checksum each:

    model weights                       over the data-parallel group (under ZeRO 3 those that it keeps whole),
                                        and, where the split table does not cut them, over the tensor-parallel
                                            group
    ZeRO 3's part of an uncut weight    over the tensor-parallel group; over the data-parallel one nobody else
                                        has it
    fp32 masters, where there are any   of uncut weights over the tensor-parallel group; under ZeRO 0 all,
                                        over the data-parallel one too

The checksum of a tensor, seen as 64-bit integers w_i modulo 2^64, is sum_i c_(i mod 256) w_i with odd c: any
one flipped bit changes it, and so does nearly every exchange of values. It reads each tensor once and makes
no copy (of one that does not lie at a multiple of 8 bytes, a piece at a time); then 8 bytes a tensor are
reduced over each group, and the host waits once. Of 110 M parameters on two ranks with a CPU core each it
took 38 ms in bf16 and 44 ms in fp32 (ZeRO 1), and 85 ms in bf16 under ZeRO 0, with the masters.
"""

from __future__ import annotations

import functools
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sffn_dist.checkpoint.writer import Fragment
from sffn_dist.health.consistency import name_ranks
from sffn_dist.launch import exit_codes
from sffn_dist.parallel.object_collectives import all_gather_object
from sffn_dist.parallel.topology import Topology
from sffn_dist.spec.config import Config
from sffn_dist.spec.split_table import is_guide, model_tensors

LANES = 256  # weights c of the checksum
PIECE = 2**20  # words of 8 bytes copied at a time where a tensor is not aligned; a multiple of LANES
MAX_NAMED_PARAMETERS = 3  # parameters that a message names


class ReplicasDifferError(RuntimeError):
    """Replicas are none any more: ``parameters`` that differ, and the ``ranks`` that are odd, or that
    nobody can tell apart.
    """

    exit_code = exit_codes.REPLICAS_DIFFER

    def __init__(self, message: str, parameters: Sequence[str], ranks: Sequence[int]):
        super().__init__(message)
        self.parameters, self.ranks = tuple(parameters), tuple(ranks)


@dataclass(frozen=True)
class _Compared:
    """A tensor of this rank, and over which groups others have the same."""

    name: str
    tensor: Tensor
    over: tuple[str, ...]


def check_replicas(model: nn.Module, masters: Iterable[Fragment], config: Config, topology: Topology) -> None:
    """Compare replicas of the weights between two steps; all ranks must call it.

    ``masters``: what this rank holds of the fp32 weights, where they are not the model's own
    (engine_state.fragments).

    Raises ReplicasDifferError on every rank: which parameters, over which group, and whose are the odd ones
    where more ranks agree on others.
    """
    if topology.world_size == 1:
        return
    # those over the data-parallel group come first, those over the tensor-parallel one last: slices, for an
    # index would make the host wait
    held = sorted(
        _compared(model, masters, config, topology),
        key=lambda item: ("tensor" in item.over) - ("data" in item.over),
    )
    sums = (
        torch.stack([checksum(item.tensor) for item in held]) if held else torch.zeros(0, dtype=torch.int64)
    )
    sums, differ = sums.to(topology.device), {}
    count_over = {name: sum(name in item.over for item in held) for name in ("data", "tensor")}
    for name, size, group, own in (
        ("data", topology.data_parallel_size, topology.data_group, sums[: count_over["data"]]),
        (
            "tensor",
            topology.tensor_parallel_size,
            topology.tensor_group,
            sums[len(held) - count_over["tensor"] :],
        ),
    ):
        bounds = torch.stack([own, ~own])  # the least of ~x is ~ of the greatest x
        if size > 1:
            dist.all_reduce(bounds, op=dist.ReduceOp.MIN, group=group)
        differ[name] = bounds[0] != ~bounds[1]
    any_differ = torch.cat(list(differ.values())).any().to(torch.int32)
    dist.all_reduce(any_differ, op=dist.ReduceOp.MAX)
    if int(any_differ):
        raise _error(held, sums, differ, topology)


def _compared(
    model: nn.Module, masters: Iterable[Fragment], config: Config, topology: Topology
) -> Iterator[_Compared]:
    """What is compared on this rank, in an order that all ranks share."""
    named_params = list(model.named_parameters())
    specs = model_tensors(config, guide=any(is_guide(name) for name, _ in named_params))

    def over(name: str, *, data: bool) -> tuple[str, ...]:
        groups = {
            "data": data and topology.data_parallel_size > 1,
            "tensor": specs[name].cut is None and topology.tensor_parallel_size > 1,
        }
        return tuple(group for group, wanted in groups.items() if wanted)

    def candidates() -> Iterator[_Compared]:
        for name, parameter in named_params:
            p: Any = parameter
            if not hasattr(p, "ds_tensor"):
                yield _Compared(name, p.data, over(name, data=True))
                continue
            if p.ds_persist and p.data.numel() == p.ds_numel:
                yield _Compared(name, p.data, over(name, data=True))
            part = p.ds_tensor.ds_numel  # the last parts are padded with whatever there was
            numel = max(0, min(part, p.ds_numel - part * topology.data_parallel_rank))
            yield _Compared(f"{name} (part)", p.ds_tensor.data.view(-1)[:numel], over(name, data=False))
        for fragment in masters:
            group_names = over(fragment.name, data=config.zero.stage == 0)
            yield _Compared(f"{fragment.name} (fp32)", fragment.tensors["weight"], group_names)

    return (item for item in candidates() if item.over)


# --------------------------------------------------------------------------------------------------- checksum


@torch.no_grad()
def checksum(tensor: Tensor) -> Tensor:
    """A tensor's bits as one int64 scalar on its device; equal for equal bits, wherever in memory they lie.

    NaNs are bits too.

    (A sum of int32 in int64 would copy all of it in int64 first: 30 times slower, on CPU.)
    """
    flat = tensor.detach().reshape(-1)
    width = 8 // flat.element_size()
    whole = flat.numel() // width * width
    lanes = torch.zeros(LANES, dtype=torch.int64, device=flat.device)
    aligned = flat.storage_offset() % width == 0
    piece = max(1, whole) if aligned else PIECE * width
    for start in range(0, whole, piece):
        words = flat[start : min(start + piece, whole)]
        words = (words if aligned else words.clone()).view(torch.int64)
        full = words.numel() // LANES * LANES
        lanes += words[:full].view(-1, LANES).sum(0)
        lanes[: words.numel() - full] += words[full:]
    factors = _factors(flat.device)
    rest = (
        flat[whole:]
        .clone()
        .view({2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
        .to(torch.int64)
    )
    return (lanes * factors).sum() + (rest * factors[LANES // 2 : LANES // 2 + rest.numel()]).sum()


@functools.cache
def _factors(device: torch.device) -> Tensor:
    """LANES odd numbers of 64 bits."""
    return (torch.arange(LANES, device=device) * 2 + 1) * (0x9E3779B97F4A7C15 - 2**64)


# -------------------------------------------------------------------------------------------------- the error


def _error(
    held: Sequence[_Compared], sums: Tensor, differ: Mapping[str, Tensor], topology: Topology
) -> ReplicasDifferError:
    """Names what differs, the same on every rank."""
    own_report: dict[str, Any] = {"host": socket.gethostname(), "compared": len(held)}
    for name, group in (("data", topology.data_group), ("tensor", topology.tensor_group)):
        inside = [i for i, item in enumerate(held) if name in item.over]
        chosen = [i for i, differs in zip(inside, differ[name].tolist(), strict=True) if differs]
        values = {held[i].name: int(sums[i]) for i in chosen}
        own_report[name] = (tuple(dist.get_process_group_ranks(group)), values)
    gathered = all_gather_object(own_report)
    return describe(
        [rank_report["host"] for rank_report in gathered],
        [rank_report["compared"] for rank_report in gathered],
        gathered,
    )


def describe(
    hosts: Sequence[str], compared: Sequence[int], gathered: Sequence[Mapping[str, Any]]
) -> ReplicasDifferError:
    """The error of what ranks found: ``found[rank]["data" or "tensor"]`` is (ranks of its group, differing
    name -> its checksum).
    """
    lines: dict[tuple[str, tuple[int, ...], tuple[int, ...]], list[str]] = {}
    for kind in ("data", "tensor"):
        for members, values in dict.fromkeys((held[kind][0], tuple(held[kind][1])) for held in gathered):
            for name in values:
                odd = _odd({rank: gathered[rank][kind][1][name] for rank in members})
                lines.setdefault((kind, members, odd), []).append(name)
    texts = []
    for (kind, members, odd), names in lines.items():
        listed = ", ".join(names[:MAX_NAMED_PARAMETERS]) + (
            f" and {len(names) - MAX_NAMED_PARAMETERS} more" if len(names) > MAX_NAMED_PARAMETERS else ""
        )
        whose = (
            f"odd: {name_ranks(odd, hosts)}"
            if len(odd) < len(members)
            else f"between {name_ranks(odd, hosts)}"
        )
        texts.append(
            f"{len(names)} of {compared[members[0]]} tensors over the {kind}-parallel group of ranks "
            f"{', '.join(map(str, members))}, {whose}: {listed}"
        )
    sets = [set(odd) for _, _, odd in lines]
    suspects = set.intersection(*sets) or set.union(*sets)
    if len(suspects) == 1:
        texts.append(f"so it is {name_ranks(suspects, hosts)}")
    parameters = dict.fromkeys(name.split(" ")[0] for names in lines.values() for name in names)
    return ReplicasDifferError(
        "replicas of the weights differ: " + "; ".join(texts), list(parameters), sorted(suspects)
    )


def _odd(values: Mapping[int, int]) -> tuple[int, ...]:
    """Ranks whose value is not the one that most have.

    All of them where no value is held by more ranks than any other.
    """
    held = list(values.values())
    counts = sorted(((held.count(value), value) for value in set(held)), reverse=True)
    if len(counts) > 1 and counts[0][0] == counts[1][0]:
        return tuple(values)
    return tuple(rank for rank, value in values.items() if value != counts[0][1])
