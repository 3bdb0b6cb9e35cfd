"""Checks and first weights of structured linears, also in a model that is not ours."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from sffn_dist.parallel import cpu_compat
from sffn_dist.structured import functional
from sffn_dist.structured.cut import Role, TensorSpec
from sffn_dist.structured.registry import listed, structured_kinds
from sffn_dist.structured.structure import Size, Structure, refuse

# between the seeds of expert-parallel ranks: odd and far from small numbers
_NEXT_EXPERT_RANK = 0x9E3779B97F4A7C15


def check_structure(structure: Structure) -> None:
    """Raise ValueError if the settings do not make a structure, or it has nothing structured."""
    if structure.dense:
        raise ValueError(f"kind = {structure.kind!r}: must be {listed(structured_kinds())}")
    refuse(structure.setting_problems())


def check_sizes(structure: Structure, role: Role, inputs: int, outputs: int, ranks: int) -> None:
    """Raise ValueError if an (outputs, inputs) matrix, of a gated pair one half, cannot have this
    structure, or on so many ranks.
    """
    sizes = Size("input size", inputs), Size("output size", outputs)
    outer, inner = sizes if role == "column" else sizes[::-1]
    refuse(
        [
            *structure.size_problems(outer, inner),
            *structure.tensor_parallel_problems(inner, Size("tensor-parallel ranks", ranks)),
        ]
    )


@torch.no_grad()
def draw_replicated(
    structure: Structure,
    specs: Mapping[str, TensorSpec],
    sizes: tuple[int, int],
    std: float,
    generator: torch.Generator | None,
    group: dist.ProcessGroup,
    *,
    expert: bool = False,
) -> dict[str, Tensor]:
    """Full factors (and guide) of a linear of ``sizes`` (inputs, outputs), the same bits on every rank of
    ``group``.

    The group's first rank draws and the others receive: neither their random states nor their libraries,
    which choose the signs of singular vectors, need agree. Every rank draws a seed, so that ``generator``
    (None: torch's own) moves on alike everywhere and the next linear's weights are others. Experts of
    different expert-parallel ranks get different weights.
    """
    device = generator.device if generator is not None else torch.device("cpu")
    seed = int(torch.randint(2**62, (), generator=generator, device=device))
    if expert and parallel_state.is_initialized():
        seed = (seed + _NEXT_EXPERT_RANK * parallel_state.get_expert_model_parallel_rank()) % 2**63
    device = cpu_compat.device()
    if group.rank() == 0:
        own = torch.Generator(device).manual_seed(seed)
        full = functional.draw(structure, *sizes, std, own, guide="guide" in specs)
    else:
        full = {
            name: torch.empty(spec.shape, device=device) for name, spec in specs.items() if name != "bias"
        }
    if group.size() > 1:
        for name in specs:
            if name in full:
                full[name] = full[name].contiguous()
                dist.broadcast(full[name], group=group, group_src=0)
    return full
