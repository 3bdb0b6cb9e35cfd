"""What the layer benchmarks time: do all providers compute one and the same layer, and are its FLOPs what
is said.
"""

from __future__ import annotations

from typing import Any

import torch
from sffn_bench import decode, feed_forward, layers, sizes
from sffn_kernels import dispatch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sffn_dist.parallel import cpu_compat, topology
from sffn_dist.structured import functional
from sffn_dist.structured.registry import build_structure

CPU = torch.device("cpu")


def _alone() -> None:
    cpu_compat.prepare()
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    topology.groups(1)


def _error(got: Tensor, want: Tensor) -> float:
    return float(((got - want).square().mean() / want.square().mean()).sqrt())


def errors(kind: Any, share: int, width: int, tokens: int) -> dict[str, dict[str, float]]:
    """Provider -> relative RMS errors: of the output (against the dense layer), and of the gradients
    (against bmm's).
    """
    _alone()
    layer, generator = sizes.layer(kind, share, width), torch.Generator().manual_seed(5)
    made = layers.providers(layer, CPU)
    shapes = {name: held.shape for name, held in made["bmm"].named_parameters()}
    weights = {
        name: torch.randn(shape, generator=generator) / shape[-1] ** 0.5 for name, shape in shapes.items()
    }
    x, sent = (torch.randn(tokens, width, generator=generator) for _ in range(2))
    want = _dense(layer, weights, x)
    gradients = {name: _run(name, module, weights, x, sent) for name, module in made.items()}
    found = {
        name: {
            part: _error(got, want if part == "y" else gradients["bmm"][part]) for part, got in parts.items()
        }
        for name, parts in gradients.items()
    }
    for name, forward in decode.providers(layer).items():
        found[f"decode {name}"] = {"y": _error(forward(x, tuple(weights.values())), want)}
    return found


def _run(
    provider: str, module: nn.Module, weights: dict[str, Tensor], x: Tensor, sent: Tensor
) -> dict[str, Tensor]:
    """The output, and the gradients of x and of every parameter, as the benchmark runs the layer."""
    held = {name.removeprefix("mlp."): parameter for name, parameter in module.named_parameters()}
    assert list(held) == list(weights)
    for name, parameter in held.items():
        parameter.data.copy_(weights[name])
    x = x.clone().requires_grad_()
    with dispatch.using(layers.KERNELS.get(provider, "auto")):
        y = module(x)
    y.backward(sent)
    return {"y": y, "x": x.grad, **{name: parameter.grad for name, parameter in held.items()}}


def _dense(layer: sizes.Layer, weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """The output by the dense matrices that the factors stand for."""
    held: list[Tensor] = []
    for linear in ("linear_fc1", "linear_fc2"):
        own = {name.split(".")[1]: weight for name, weight in weights.items() if name.startswith(linear)}
        held += [functional.to_dense(layer.structure, own), own["bias"]]
    return decode.dense(x, tuple(held))


def flops(kind: Any, width: int, tokens: int) -> dict[str, tuple[int, int]]:
    """Mode -> FLOPs that torch counts in the plain layer, and those that the benchmark says."""
    _alone()
    layer = sizes.Layer(build_structure("dense"), width) if kind == "dense" else sizes.layer(kind, 32, width)
    x, sent = torch.randn(tokens, width, requires_grad=True), torch.randn(tokens, width)
    provider, module = next(iter(layers.providers(layer, CPU).items()))
    found: dict[str, tuple[int, int]] = {}
    for mode in (*feed_forward.MODES["ffn"], *feed_forward.MODES["step"]):
        with FlopCounterMode(display=False) as counter:
            feed_forward.Case(layer, provider, module, mode, x, sent).once()
        found[mode] = counter.get_total_flops(), sizes.work(layer, tokens, mode, 4)[0]
    return found


def floors(width: int, tokens: int, devices: list[str]) -> list[float | None]:
    """floor_ms of the dense layer's forward pass in bf16, by device."""
    layer = sizes.Layer(build_structure("dense"), width)
    return [
        feed_forward.floor(layer, tokens, "forward", torch.bfloat16, name)["floor_ms"] for name in devices
    ]
