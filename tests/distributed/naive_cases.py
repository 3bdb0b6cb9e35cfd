"""The benchmark's naive split against the structure that it stands for."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "kernels"))

from bench.naive_split import NaiveLinear
from bench.tensor_parallel import transformer

from sffn_dist.parallel import host, topology
from sffn_dist.shapes import Structure
from sffn_dist.structured import maps


def error(structure: dict[str, Any], inputs: int, outputs: int, sequence: bool) -> float:
    """Largest difference from the structure's own map, of the linear as this rank computes it."""
    host.prepare()
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    ranks = topology.groups(torch.distributed.get_world_size())
    p, rank, kind = ranks.tensor, ranks.tensor_rank, Structure(**structure)
    linear = NaiveLinear(kind, inputs, outputs, transformer(inputs, outputs, p, sequence), p, rank)
    generator = torch.Generator().manual_seed(3)
    factors = {name: torch.randn(shape, generator=generator) for name, shape in kind.factor_shapes(inputs, outputs).items()}
    first, second = factors.values()
    with torch.no_grad():
        linear.first.weight.copy_(first.chunk(p)[rank])  # rank or blocks are cut
        linear.second.weight.copy_(second.chunk(p, dim=-1)[rank])
        x = torch.randn(8, 2, inputs, generator=generator)
        y = linear(x.chunk(p)[rank] if sequence else x)
        want = maps.apply(kind, x, factors)
    return float((y - (want.chunk(p)[rank] if sequence else want)).abs().max())
