"""Cut a full tensor into a rank's part and put parts together again, as the split table of
spec/split_table.py says.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sffn_dist.structured.cut import TensorSpec


def part_view(full: Tensor, spec: TensorSpec, p: int, rank: int) -> Tensor:
    """A view (shaped as the cut's view) of ``rank``'s part of ``full``."""
    if spec.cut is None or p == 1:
        return full
    view = full.reshape(spec.cut.view)
    for axis, start, length in spec.cut.starts(p, rank):
        view = view.narrow(axis, start, length)
    return view


def shard(full: Tensor, spec: TensorSpec, p: int, rank: int) -> Tensor:
    """``rank``'s part of ``full``, contiguous; raises ValueError on a wrong shape."""
    if tuple(full.shape) != spec.shape:
        raise ValueError(f"tensor of shape {tuple(full.shape)} where the split table says {spec.shape}")
    return part_view(full, spec, p, rank).reshape(spec.local_shape(p)).contiguous()


def unshard(parts: Sequence[Tensor], spec: TensorSpec) -> Tensor:
    """The full tensor of p parts, in rank order."""
    p = len(parts)
    if spec.cut is None or p == 1:
        return parts[0].clone()
    full = parts[0].new_empty(spec.shape)
    for rank, part in enumerate(parts):
        part_view(full, spec, p, rank).copy_(part.reshape(spec.cut.local_view(p)))
    return full
