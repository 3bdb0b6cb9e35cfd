"""Collectives of Python objects.

Without a process group, or in a group of one, the result is what this rank has.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def all_gather_object(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """The value of every rank of ``group`` (None: all ranks), in rank order. All its ranks must call it."""
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, value, group=group)
    return gathered


def broadcast_object(
    value: Any, group: dist.ProcessGroup | None = None, device: torch.device | None = None
) -> Any:
    """Rank 0's value, on every rank of ``group`` (None: all ranks). All its ranks must call it.

    ``device``: where the pickled bytes travel from, for backends that send from one kind of device alone.
    """
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=group, device=device)
    return box[0]
