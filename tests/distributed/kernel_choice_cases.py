"""Kernels chosen on several ranks that measure different times: a device is made believe, the ranks and
their sums are real.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from sffn_kernels import choices as tables_of_choices
from sffn_kernels import dispatch
from sffn_kernels.choices import KernelChoice

from sffn_dist.parallel import cpu_compat, kernel_choice, topology


class Card:
    """Stands in for a tensor on a CUDA device: only its kind and its dtype are asked."""

    device, dtype = torch.device("cuda", 0), torch.float16


class NamedTimes:
    """A device's clock, by which each way takes the times of this rank, one after the other."""

    def __init__(self, own: dict[str, list[float]]) -> None:
        self.own, self.measured, self.first = own, list[str](), 0.0

    def wait(self) -> None:
        return

    def milliseconds(self, way: Callable[[], str]) -> float:
        self.first = self.first or time.time()
        name = way()
        self.measured.append(name)
        return self.own[name][(self.measured.count(name) - 1) % len(self.own[name])]


def choices(
    reasons: list[str | None],
    tables: list[dict[str, str]],
    times: list[list[list[float]]],
    compiling: list[float] | None = None,
) -> dict[str, Any]:
    """What this rank chooses for two operations, what it timed in which order, and when.

    Arguments hold an entry a rank; ``compiling``: seconds that the first call of a kernel takes.
    """
    cpu_compat.prepare()
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    here = topology.groups(1)
    clock = NamedTimes(dict(zip(("torch", "slow", "quick"), times[here.rank], strict=True)))
    seconds, compiled = (compiling or [0.0] * here.world_size)[here.rank], dict[str, float]()

    def way(name: str) -> Callable[[], str]:
        def run() -> str:
            if name not in compiled:
                time.sleep(seconds)
                compiled[name] = time.time()
            return name

        return run

    cuda: Any = torch.cuda
    kept = {name: getattr(cuda, name) for name in ("device", "is_current_stream_capturing")}
    state: Any = dispatch._DispatchState
    usual = dispatch.unavailable, state.setting, state.clock, tables_of_choices.write
    module: Any = dispatch
    all_reduce, broadcast_list, as_tensor, as_zeros = (
        dist.all_reduce,
        dist.broadcast_object_list,
        torch.tensor,
        torch.zeros,
    )
    on_host: Any = torch
    try:
        cuda.device = lambda device: torch.no_grad()
        cuda.is_current_stream_capturing = lambda: False
        module.unavailable = lambda device: reasons[here.rank]
        state.clock = lambda device: clock
        tables_of_choices.write = lambda device, table, folder: clock.measured.append("written")
        state.table = {row: KernelChoice(name, name) for row, name in tables[here.rank].items()}
        claimed = dataclasses.replace(here, device=torch.device("cuda", 0))
        on_host.tensor = lambda values, device=None: as_tensor(values)
        on_host.zeros = lambda *size, **options: as_zeros(*size, **{**options, "device": "cpu"})
        dist.broadcast_object_list = lambda held, src, group, device: broadcast_list(held, src=src)
        kernel_choice.start("auto", claimed)
        ways = {"slow": way("slow"), "quick": way("quick")}
        chosen = [
            dispatch.run(op, (100, 8), Card(), lambda: "torch", lambda: ways)  # type: ignore[arg-type]
            for op in ("known", "new", "new")
        ]
        return {
            "chosen": chosen,
            "measured": clock.measured,
            "table": {row: dataclasses.asdict(choice) for row, choice in state.table.items()},
            "first_timed": clock.first,
            "last_compiled": max(compiled.values(), default=0.0),
        }
    finally:
        on_host.tensor, on_host.zeros = as_tensor, as_zeros
        dist.all_reduce, dist.broadcast_object_list = all_reduce, broadcast_list
        for name, function in kept.items():
            setattr(cuda, name, function)
        module.unavailable, state.setting, state.clock, tables_of_choices.write = usual
        state.table = None
        dispatch.agree_by(None)
