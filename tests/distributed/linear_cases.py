"""A feed-forward layer of structured linears on p ranks against plain one-device mathematics, in float64."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.model_parallel_config import ModelParallelConfig
from torch import Tensor

from sffn_dist.parallel import host, topology
from sffn_dist.parallel.collectives import sum_partial_gradients
from sffn_dist.parallel.linears import StructuredColumnParallelLinear, StructuredRowParallelLinear
from sffn_dist.parallel.split import shard, unshard
from sffn_dist.shapes import Structure, linear_tensors
from sffn_dist.structured import maps


def _full_tensors(structure: Structure, h: int, f: int, gated: bool, bias: bool, guide: bool) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    sizes = {"column": (h, 2 * f if gated else f), "row": (f, h)}
    full: dict[str, dict[str, Tensor]] = {}
    for role, (inputs, outputs) in sizes.items():
        specs = linear_tensors(structure, role, inputs, outputs, gated=gated and role == "column", bias=bias, guide=guide)
        full[role] = {
            name: torch.randn(spec.shape, generator=generator, dtype=torch.float64) / spec.shape[-1] ** 0.5
            for name, spec in specs.items()
        }
    return full


def _activation(y: Tensor, gated: bool) -> Tensor:
    if not gated:
        return F.gelu(y, approximate="tanh")
    gate, up = y.chunk(2, dim=-1)
    return F.silu(gate) * up


def _reference(structure: Structure, full: dict[str, dict[str, Tensor]], x: Tensor, gated: bool, alpha: float | None) -> Tensor:
    def linear(tensors: dict[str, Tensor], value: Tensor) -> Tensor:
        factors = {name: t for name, t in tensors.items() if name not in ("bias", "guide")}
        y = maps.apply(structure, value, factors)
        if alpha is not None:
            y = alpha * F.linear(value, tensors["guide"]) + (1 - alpha) * y
        return y + tensors["bias"] if "bias" in tensors else y

    return linear(full["row"], _activation(linear(full["column"], x), gated))


def _error(got: Tensor, want: Tensor) -> float:
    scale = want.square().mean().sqrt().item()
    return (got - want).square().mean().sqrt().item() / (scale or 1.0)


def feed_forward_errors(
    kind: str, rank: int | None, blocks: int | None, h: int, f: int, gated: bool, bias: bool, sequence: bool,
    alpha: float | None, rows: int, batch: int,
) -> dict[str, float]:  # fmt: skip
    """Relative RMS error of the output and of every gradient, on this rank, against the reference."""
    host.prepare()
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    p = torch.distributed.get_world_size()
    ranks = topology.groups(p)
    structure = Structure(kind, rank, blocks)
    full = _full_tensors(structure, h, f, gated, bias, guide=alpha is not None)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(rows, batch, h, generator=generator, dtype=torch.float64)
    weight = torch.randn(rows, batch, h, generator=generator, dtype=torch.float64)

    for tensors in full.values():
        for tensor in tensors.values():
            tensor.requires_grad_()
    x_ref = x.clone().requires_grad_()
    y_ref = _reference(structure, full, x_ref, gated, alpha)
    (y_ref * weight).sum().backward()

    config = ModelParallelConfig(
        params_dtype=torch.float64,
        tensor_model_parallel_size=p,
        sequence_parallel=sequence,
        use_cpu_initialization=True,
        perform_initialization=False,
    )
    options: dict[str, Any] = {"structure": structure, "config": config, "bias": bias, "guide": alpha is not None}
    layers = torch.nn.ModuleDict(
        {
            "column": StructuredColumnParallelLinear(h, 2 * f if gated else f, stride=2 if gated else 1, **options),
            "row": StructuredRowParallelLinear(f, h, **options),
        }
    )
    for role, layer in layers.items():
        layer.guide_weight = alpha
        for name, tensor in full[role].items():
            getattr(layer, name).data.copy_(shard(tensor.detach(), layer.specs[name], p, ranks.tensor_rank))
    sum_partial_gradients(layers, ranks.tensor_group)
    mine = slice(ranks.tensor_rank * rows // p, (ranks.tensor_rank + 1) * rows // p) if sequence else slice(None)
    x_local = x[mine].clone().requires_grad_()
    y, no_bias = layers["row"](_activation(layers["column"](x_local)[0], gated))
    assert no_bias is None
    (y * weight[mine]).sum().backward()

    errors = {"y": _error(y.detach(), y_ref[mine].detach()), "x.grad": _error(x_local.grad, x_ref.grad[mine])}
    for role, layer in layers.items():
        for name, tensor in full[role].items():
            parts = [torch.empty_like(getattr(layer, name)) for _ in range(p)]
            torch.distributed.all_gather(parts, getattr(layer, name).grad.contiguous())
            spec = layer.specs[name]
            errors[f"{role}.{name}.grad"] = _error(unshard(parts, spec), tensor.grad)
            if spec.cut is None:  # replicas: bit-identical
                assert all(torch.equal(part, parts[0]) for part in parts), f"{role}.{name}: replicated gradients differ"
    return errors
