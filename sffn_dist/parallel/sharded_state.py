"""Structured linears in megatron-core's distributed checkpoints: saved on some number of tensor-parallel
ranks, loaded on any other.

megatron-core describes a rank's part of a tensor as one box of a regular grid over the full tensor. A cut of
the split table is such a grid only in the cut's *view* of the tensor, so the checkpoint holds the view: its
global shape is ``(*sharded_offsets, *cut.view)`` whatever the number of ranks p, a rank's box is
``cut.local_view(p)`` large, and a factory reshapes between that and the parameter:

    save   parameter, local shape -> reshape(cut.local_view(p)) -> box at cut.starts(p, rank)
    load   box -> reshape(local shape) -> load_state_dict

Replicated tensors are stored as they are. ``sharded_offsets`` are the axes that enclosing modules prepend:
layers, experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group
from torch import Tensor

from sffn_dist.structured.cut import TensorSpec

Offsets = Sequence[tuple[int, int, int]]  # (axis, index, size) of each prepended axis
HALVES = "bias_halves"


class ShardedLinear(Protocol):
    """What is asked of a linear: its parameters by the split table, its place in the tensor-parallel
    group.
    """

    specs: dict[str, TensorSpec]
    halves: int
    ranks: int
    rank: int


def linear_sharded_state_dict(
    linear: ShardedLinear,
    prefix: str = "",
    sharded_offsets: Offsets = (),
    metadata: dict[str, Any] | None = None,
) -> dict[str, ShardedTensor | ShardedTensorFactory]:
    """Every tensor of ``linear`` as megatron-core's checkpoints take it, under the checkpoint key ``prefix +
    name``.

    replica_id is (0, tensor-parallel rank of a replicated tensor, data-parallel rank), of the linear's own
    tensor-parallel group (for an expert its expert group; SequentialMLP puts in the experts' data-parallel
    rank itself). ``metadata`` may hold ``dp_cp_group``.

    A gated pair's bias stands in the dictionary as ``bias_halves``: what megatron-core's MLP finds there as
    ``linear_fc1.bias`` it cuts into halves itself, as if every rank held one run of features from each, which
    a strided cut does not. :func:`restore_names` gives the name back on loading; in the checkpoint the key is
    ``bias``.
    """
    data_rank = ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"].rank()
    entries: dict[str, ShardedTensor | ShardedTensorFactory] = {}
    for name, spec in linear.specs.items():
        entry = HALVES if name == "bias" and linear.halves == 2 else name
        parameter = getattr(linear, name)
        if spec.cut is None:
            entries[prefix + entry] = ShardedTensor.from_rank_offsets(
                prefix + name,
                parameter,
                *sharded_offsets,
                replica_id=(0, linear.rank, data_rank),
                prepend_axis_num=len(sharded_offsets),
            )
        else:
            entries[prefix + entry] = _in_view(
                prefix + name,
                parameter,
                spec,
                linear.ranks,
                linear.rank,
                tuple(sharded_offsets),
                (0, 0, data_rank),
            )
    return entries


def _in_view(
    key: str,
    parameter: Tensor,
    spec: TensorSpec,
    p: int,
    rank: int,
    prepended: Offsets,
    replica_id: tuple[int, ...],
) -> ShardedTensorFactory:
    """A cut parameter, saved as its box of the view. The optimizer's moments go through the same factory."""
    cut = spec.cut
    assert cut is not None
    offsets = [
        (axis + len(prepended), start // length, cut.view[axis] // length)
        for axis, start, length in cut.starts(p, rank)
    ]

    @torch.no_grad()
    def build(
        key: str, tensor: Tensor, replica_id: tuple[int, ...], flattened_range: slice | None
    ) -> list[ShardedTensor]:
        box = ShardedTensor.from_rank_offsets(
            key,
            tensor.reshape(cut.local_view(p)),
            *prepended,
            *offsets,
            replica_id=replica_id,
            prepend_axis_num=len(prepended),
            flattened_range=flattened_range,
        )
        return [box]

    @torch.no_grad()
    def merge(boxes: list[Tensor]) -> Tensor:
        return boxes[0].reshape(spec.local_shape(p))

    return ShardedTensorFactory(key, parameter, build, merge, replica_id)


def restore_names(linear: ShardedLinear, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before ``load_state_dict``: a gated pair's bias gets its own name back."""
    if prefix + HALVES in state_dict:
        state_dict[prefix + "bias"] = state_dict.pop(prefix + HALVES)
