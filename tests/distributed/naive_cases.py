"""What the benchmarks compare with, against what it stands for: the naive split, the guide mixed in three
passes.
"""

from __future__ import annotations

from typing import Any

import torch
from sffn_bench.guided import ThreePassesMLP, ours
from sffn_bench.naive_split import NaiveLinear
from sffn_bench.one_layer import transformer

from sffn_dist.parallel import cpu_compat, topology
from sffn_dist.structured import functional
from sffn_dist.structured.registry import build_structure


def _ranks() -> topology.Topology:
    cpu_compat.prepare()
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    return topology.groups(torch.distributed.get_world_size())


def error(structure: dict[str, Any], inputs: int, outputs: int, sequence: bool) -> float:
    """Largest difference from the structure's own map, of the linear as this rank computes it."""
    ranks = _ranks()
    p, rank, kind = ranks.tensor_parallel_size, ranks.tensor_parallel_rank, build_structure(**structure)
    linear = NaiveLinear(kind, inputs, outputs, transformer(inputs, outputs, p, sequence), p, rank)
    generator = torch.Generator().manual_seed(3)
    factors = {
        name: torch.randn(shape, generator=generator)
        for name, shape in kind.factor_shapes(inputs, outputs).items()
    }
    first, second = factors.values()
    with torch.no_grad():
        linear.first.weight.copy_(first.chunk(p)[rank])  # rank or blocks are cut
        linear.second.weight.copy_(second.chunk(p, dim=-1)[rank])
        x = torch.randn(8, 2, inputs, generator=generator)
        y = linear(x.chunk(p)[rank] if sequence else x)
        want = functional.apply(kind, x, factors)
    return float((y - (want.chunk(p)[rank] if sequence else want)).abs().max())


def three_passes_errors(structure: dict[str, Any], h: int, f: int, alpha: float) -> dict[str, float]:
    """Largest difference between the guided layer and the one of three passes, as a share of the largest
    value: y and every gradient.
    """
    config, kind = (
        transformer(h, f, _ranks().tensor_parallel_size, sequence=False),
        build_structure(**structure),
    )
    layers = ours(kind, config, guide=True, alpha=alpha), ThreePassesMLP(kind, config, alpha)
    generator = torch.Generator().manual_seed(3)
    weights = {
        name: torch.randn(held.shape, generator=generator) for name, held in layers[0].named_parameters()
    }
    inputs, grad = (torch.randn(8, 2, h, generator=generator) for _ in range(2))
    found: list[dict[str, torch.Tensor]] = []
    for layer in layers:
        layer.load_state_dict({name: weight / weight.shape[-1] ** 0.5 for name, weight in weights.items()})
        x = inputs.clone().requires_grad_()
        y = layer(x)[0]
        y.backward(grad)
        found.append({"y": y, "x": x.grad, **{name: held.grad for name, held in layer.named_parameters()}})
    mixed, plain = found
    assert mixed.keys() == plain.keys()
    return {name: float((mixed[name] - plain[name]).abs().max() / plain[name].abs().max()) for name in plain}
