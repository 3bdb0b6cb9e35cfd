"""What a structured linear sees to by itself in a model that no run of ours sets up: that its sizes fit, and its first weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from sffn_dist.parallel import cpu_compat
from sffn_dist.spec.split_table import Structure, TensorSpec
from sffn_dist.structured import initialisation

_NEXT_EXPERT_RANK = 0x9E3779B97F4A7C15  # between the seeds of expert-parallel ranks: odd and far from small numbers


def check_structure(structure: Structure) -> None:
    """Raise ValueError if ``kind``, ``rank`` and ``blocks`` do not make a structure."""
    kind, needs_rank, needs_blocks = structure.kind, ("low_rank", "block_dense"), ("block_shuffle", "block_dense")
    if kind not in (*needs_rank, *needs_blocks):
        raise ValueError(f'kind = {kind!r}: must be "low_rank", "block_dense" or "block_shuffle"')
    for name, value, needed in (
        ("rank", structure.rank, kind in needs_rank),
        ("blocks", structure.blocks, kind in needs_blocks),
    ):
        if needed and value is None:
            raise ValueError(f'{name}: missing; kind = "{kind}" needs it')
        if not needed and value is not None:
            raise ValueError(f'{name} = {value}: kind = "{kind}" has none')
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} = {value!r}: must be a positive whole number")
    if kind == "block_dense" and structure.needed_rank % structure.needed_blocks:
        raise ValueError(f"blocks = {structure.blocks}: must divide rank = {structure.rank}")


def check_sizes(structure: Structure, inputs: int, outputs: int) -> None:
    """Raise ValueError if an (outputs, inputs) matrix, of a gated pair one half, cannot have this structure."""
    if structure.rank is not None and structure.rank > min(inputs, outputs):
        raise ValueError(f"rank = {structure.rank}: must not exceed {min(inputs, outputs)}, the smaller side of the matrix")
    for side, size in (("input", inputs), ("output", outputs)):
        if structure.blocks is not None and size % structure.blocks:
            raise ValueError(f"blocks = {structure.blocks}: must divide the {side} size {size}")


def check_ranks(structure: Structure, inner: int, ranks: int) -> None:
    """Raise ValueError if the ``inner`` features cannot be split over that many tensor-parallel ranks."""
    if ranks == 1:
        return
    if inner % ranks:
        raise ValueError(f"inner width {inner}: must be divisible by the {ranks} tensor-parallel ranks")
    blocks = structure.blocks or 1
    if structure.kind == "block_shuffle" and inner % blocks**2:
        raise ValueError(f"blocks = {blocks}: its square must divide the inner width {inner} under tensor parallelism")


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
    """Full factors (and guide) of a linear of ``sizes`` (inputs, outputs), the same bits on every rank of ``group``.

    The group's first rank draws and the others receive: neither their random states nor their libraries, which choose the signs of
    singular vectors, need agree. Every rank draws a seed, so that ``generator`` (None: torch's own) moves on alike everywhere and the
    next linear's weights are others. Experts of different expert-parallel ranks get different weights.
    """
    device = generator.device if generator is not None else torch.device("cpu")
    seed = int(torch.randint(2**62, (), generator=generator, device=device))
    if expert and parallel_state.is_initialized():
        seed = (seed + _NEXT_EXPERT_RANK * parallel_state.get_expert_model_parallel_rank()) % 2**63
    device = cpu_compat.device()
    if group.rank() == 0:
        own = torch.Generator(device).manual_seed(seed)
        full = initialisation.draw(structure, *sizes, std, own, guide="guide" in specs)
    else:
        full = {name: torch.empty(spec.shape, device=device) for name, spec in specs.items() if name != "bias"}
    if group.size() > 1:
        for name in specs:
            if name in full:
                full[name] = full[name].contiguous()
                dist.broadcast(full[name], group=group, group_src=0)
    return full
