"""One GELU feed-forward layer with biases, y = W2 gelu(W1 x + b1) + b2, by provider: x and y (T, h), W1 (f,
h), W2 (h, f), f = 4 h.

    dense            two dense matrices; on CUDA compiled as a whole, so that biases and GELU are fused
    bmm              Monarch's classic formulation by plain autograd: batched products, permutations, copies
    torch            the product's layer, every operation in plain torch
    ours             the product's layer as a run computes it
    ours_bottleneck  the same with recompute: bottleneck

Parameters are named alike (``linear_fc1.down``, ``linear_fc1.bias``, ...; the product's within ``mlp``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sffn_bench import one_layer
from sffn_bench.sizes import Layer
from sffn_dist.parallel.feed_forward import Recompute, StructuredMLP
from sffn_dist.parallel.layer_spec import structured_mlp_submodules
from sffn_dist.structured.structure import Structure

Product = Callable[[Structure, Tensor, Mapping[str, Tensor], Tensor], Tensor]
# provider -> the setting of sffn_kernels.dispatch that it runs under; the others are not ours to choose
# kernels for
KERNELS = {"torch": "torch", "ours": "auto", "ours_bottleneck": "auto"}


def dense(structure: Structure, x: Tensor, factors: Mapping[str, Tensor], bias: Tensor) -> Tensor:
    """y = W x + b."""
    return F.linear(x, factors["weight"], bias)


def by_bmm(structure: Structure, x: Tensor, factors: Mapping[str, Tensor], bias: Tensor) -> Tensor:
    """y = U (V x) + b for x (T, n): permuting before and after batched products, as one first writes it."""
    if "down" in factors:
        return F.linear(F.linear(x, factors["down"]), factors["up"], bias)
    first = factors["block_in"]
    blocks = first.shape[0]
    by_block = x.reshape(len(x), blocks, -1).permute(1, 0, 2)  # (B, T, n/B)
    z = torch.bmm(by_block, first.transpose(1, 2)).permute(1, 0, 2).reshape(len(x), -1)
    if "up" in factors:
        return F.linear(z, factors["up"], bias)
    shuffled = z.reshape(len(x), -1, blocks).permute(2, 0, 1).contiguous()
    y = torch.bmm(shuffled, factors["block_out"].transpose(1, 2))  # (B, T, m/B)
    return y.permute(1, 2, 0).reshape(len(x), -1) + bias


class PlainLinear(nn.Module):
    """One linear by a written product; weights (outputs, inputs) as the structure has them, and a bias."""

    def __init__(self, structure: Structure, inputs: int, outputs: int, dtype: torch.dtype, product: Product):
        super().__init__()
        self.structure, self.product = structure, product
        self.names = tuple(structure.factor_shapes(inputs, outputs))
        for name, shape in {**structure.factor_shapes(inputs, outputs), "bias": (outputs,)}.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape, dtype=dtype)))

    def forward(self, x: Tensor) -> Tensor:
        """x (T, inputs) -> y (T, outputs)."""
        factors = {name: self.get_parameter(name) for name in self.names}
        return self.product(self.structure, x, factors, self.get_parameter("bias"))


class PlainMLP(nn.Module):
    """The feed-forward layer of two such linears."""

    def __init__(self, layer: Layer, dtype: torch.dtype, product: Product):
        super().__init__()
        self.linear_fc1 = PlainLinear(layer.structure, layer.width, layer.inner, dtype, product)
        self.linear_fc2 = PlainLinear(layer.structure, layer.inner, layer.width, dtype, product)

    def forward(self, x: Tensor) -> Tensor:
        """x and y (T, h)."""
        return self.linear_fc2(F.gelu(self.linear_fc1(x), approximate="tanh"))


class ProductMLP(nn.Module):
    """The product's layer, on one rank.

    The second bias, which it leaves to its caller, is added as a transformer layer does.
    """

    def __init__(self, layer: Layer, recompute: Recompute = "none"):
        super().__init__()
        structure = layer.structure
        config = one_layer.transformer(layer.width, layer.inner, 1, sequence=False, bias=True)
        linears = structured_mlp_submodules(structure.kind, rank=structure.rank, blocks=structure.blocks)
        self.mlp = StructuredMLP(config, linears, ffn_hidden_size=layer.inner, recompute=recompute)

    def forward(self, x: Tensor) -> Tensor:
        """x and y (T, h)."""
        y, bias = self.mlp(x.unsqueeze(1))
        return (y + bias).squeeze(1)


def providers(layer: Layer, device: torch.device) -> dict[str, nn.Module]:
    """The layer by each provider with small random weights, on a device.

    On CPUs ``torch`` would be ``ours`` once more, and is left out.
    """
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    if layer.structure.dense:
        made: dict[str, nn.Module] = {"dense": PlainMLP(layer, dtype, dense)}
    else:
        made = {
            "bmm": PlainMLP(layer, dtype, by_bmm),
            **({"torch": ProductMLP(layer)} if cuda else {}),
            "ours": ProductMLP(layer),
            "ours_bottleneck": ProductMLP(layer, recompute="bottleneck"),
        }
    one_layer.draw(made.values(), device)
    if cuda and "dense" in made:
        made["dense"].compile(dynamic=False)
    return made
