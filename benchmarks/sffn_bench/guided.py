"""One rank that times what the guide costs: forward + backward of one structured feed-forward layer, by
provider.

    dense          Megatron's MLP
    unguided       ours, built without a guide
    undrawn        ours with a guide that takes no part in this step: it only adds the guide's gradient, zero
    guided         ours with the guide: alpha W x + (1 - alpha) U V x mixed within the matrix products
    three_passes   the same, not fused: two scalings and a sum of whole outputs, and of their gradients

Started by ``tools/bench.py guide``, which hands it one JSON object of settings; the rows are printed as one
JSON list.
"""

from __future__ import annotations

import json
import statistics
import sys
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from sffn_bench import one_layer, rows
from sffn_dist import strict_json
from sffn_dist.parallel import topology
from sffn_dist.parallel.feed_forward import StructuredMLP
from sffn_dist.parallel.layer_spec import structured_mlp_submodules
from sffn_dist.structured import functional
from sffn_dist.structured.registry import build_structure
from sffn_dist.structured.structure import Structure

ALPHA = 0.5


class ThreePassesLinear(nn.Module):
    """y = alpha W x + (1 - alpha) U V x by plain autograd; parameters are named as a structured linear's."""

    def __init__(self, structure: Structure, inputs: int, outputs: int, dtype: torch.dtype, alpha: float):
        super().__init__()
        self.structure, self.alpha = structure, alpha
        self.shapes = structure.factor_shapes(inputs, outputs)
        for name, shape in {**self.shapes, "guide": (outputs, inputs)}.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape, dtype=dtype)))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., inputs) -> y (..., outputs)."""
        factors = {name: self.get_parameter(name) for name in self.shapes}
        dense = F.linear(x, self.get_parameter("guide"))
        return self.alpha * dense + (1 - self.alpha) * functional.apply(self.structure, x, factors)


class ThreePassesMLP(nn.Module):
    """The guided feed-forward layer of two such linears.

    Returns (y, None) as Megatron's MLP without biases does.
    """

    def __init__(self, structure: Structure, config: TransformerConfig, alpha: float):
        super().__init__()
        h, f, dtype = config.hidden_size, config.ffn_hidden_size, config.params_dtype
        self.activation = config.activation_func
        self.linear_fc1 = ThreePassesLinear(structure, h, f, dtype, alpha)
        self.linear_fc2 = ThreePassesLinear(structure, f, h, dtype, alpha)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """x and y (tokens, batch, h)."""
        return self.linear_fc2(self.activation(self.linear_fc1(x))), None


def ours(
    structure: Structure, config: TransformerConfig, *, guide: bool = False, alpha: float | None = None
) -> StructuredMLP:
    """The structured layer, ``guide`` built or not, with weight ``alpha`` in the coming passes."""
    submodules = structured_mlp_submodules(
        structure.kind, rank=structure.rank, blocks=structure.blocks, guide=guide
    )
    layer = StructuredMLP(config, submodules, ffn_hidden_size=config.ffn_hidden_size)
    layer.linear_fc1.guide_weight = layer.linear_fc2.guide_weight = alpha
    return layer


def providers(structure: Structure, config: TransformerConfig, device: torch.device) -> dict[str, nn.Module]:
    """The same layer by each provider, with small random weights."""
    layers: dict[str, nn.Module] = {
        "dense": one_layer.dense(config),
        "unguided": ours(structure, config),
        "undrawn": ours(structure, config, guide=True),
        "guided": ours(structure, config, guide=True, alpha=ALPHA),
        "three_passes": ThreePassesMLP(structure, config, ALPHA),
    }
    one_layer.draw(layers.values(), device)
    return layers


def measure(structure: Structure, settings: dict[str, Any], ranks: topology.Topology) -> list[dict[str, Any]]:
    """Rows of one structure."""
    h, f, tokens = settings["width"], settings["inner"], settings["tokens"]
    config = one_layer.transformer(h, f, ranks.tensor_parallel_size, sequence=False)
    x = torch.randn(tokens, 1, h, dtype=config.params_dtype, device=ranks.device).requires_grad_()
    layers = providers(structure, config, ranks.device)
    cases = {name: one_layer.timed(layer, x, ranks.device) for name, layer in layers.items()}
    times = rows.interleaved(cases, settings["repeats"])
    medians = {name: statistics.median(some) for name, some in times.items()}
    shape = {
        "kind": structure.kind,
        "tokens": tokens,
        "h": h,
        "f": f,
        "rank": structure.rank,
        "blocks": structure.blocks,
    }
    return [
        rows.row(
            "ffn_guided",
            name,
            "fwd+bwd",
            {
                **shape,
                "threads": settings["threads"],
                "dtype": str(config.params_dtype).removeprefix("torch."),
            },
            some,
            over_unguided=round(medians[name] / medians["unguided"], 3),
            over_dense=round(medians[name] / medians["dense"], 3),
            speedup_over_three_passes=round(medians["three_passes"] / medians[name], 2),
        )
        for name, some in times.items()
    ]


def main() -> None:
    """All structures."""
    settings = json.loads(sys.argv[1])
    ranks = one_layer.start(settings["threads"])
    found = [
        row for one in settings["structures"] for row in measure(build_structure(**one), settings, ranks)
    ]
    print(strict_json.dumps(found), flush=True)
    topology.destroy()


if __name__ == "__main__":
    main()
