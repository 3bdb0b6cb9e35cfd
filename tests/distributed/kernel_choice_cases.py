"""Kernels chosen on several ranks that measure different times: a device is made believe, the ranks and
their sums are real.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from sffn_kernels import dispatch

from sffn_dist.parallel import cpu_compat, kernel_choice, topology


class Card:
    """Stands in for a tensor on a CUDA device: only its kind and its dtype are asked."""

    device, dtype = torch.device("cuda", 0), torch.float16


def choices(
    reasons: list[str | None], tables: list[dict[str, str]], times: list[list[float]]
) -> dict[str, Any]:
    """What this rank chooses for two operations, and how often it measured; arguments hold an entry a
    rank.
    """
    cpu_compat.prepare()
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    here = topology.groups(1)
    own, measured = dict(zip(("torch", "slow", "quick"), times[here.rank], strict=True)), []

    def timed(name: str, way: Any) -> float:
        measured.append(name)
        return own[name]

    cuda: Any = torch.cuda
    kept = {name: getattr(cuda, name) for name in ("device", "is_current_stream_capturing")}
    usual = (
        dispatch.unavailable,
        dispatch._table,
        dispatch._time,
        dispatch._write,
        dispatch._DispatchState.setting,
    )
    module: Any = dispatch
    try:
        cuda.device = lambda device: torch.no_grad()
        cuda.is_current_stream_capturing = lambda: False
        module.unavailable = lambda device: reasons[here.rank]
        module._time, module._write = timed, lambda device, table: measured.append("written")
        dispatch._DispatchState.table = tables[here.rank]
        module._table = lambda device: dispatch._DispatchState.table
        claimed = dataclasses.replace(here, device=torch.device("cuda", 0))
        all_reduce, broadcast = dist.all_reduce, dist.broadcast_object_list
        as_tensor: Any = torch.tensor
        torch.tensor = lambda values, device=None: as_tensor(values)  # type: ignore[assignment]
        dist.broadcast_object_list = lambda held, src, group, device: broadcast(held, src=src)
        kernel_choice.start("auto", claimed)
        ways = {"slow": lambda: "slow", "quick": lambda: "quick"}
        chosen = [
            dispatch.run(op, (100, 8), Card(), lambda: "torch", lambda: ways)
            for op in ("known", "new", "new")
        ]  # type: ignore[arg-type]
        return {"chosen": chosen, "measured": measured}
    finally:
        torch.tensor, dist.all_reduce, dist.broadcast_object_list = as_tensor, all_reduce, broadcast
        for name, function in kept.items():
            setattr(cuda, name, function)
        module.unavailable, module._table, module._time, module._write, dispatch._DispatchState.setting = (
            usual
        )
        dispatch._DispatchState.table = None
        dispatch.agree_by(None)
