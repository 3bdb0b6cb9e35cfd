"""One rank of the tensor-parallel benchmark: forward + backward of one feed-forward layer, by provider.

    dense        Megatron's MLP: column-parallel, row-parallel
    naive        each pair of factors as a Megatron column-row pair
    bottleneck   ours: only the bottleneck travels
    recomputed   ours, keeping only the bottlenecks for backward

Started by ``tools/bench.py tp``; rank 0 prints the rows as one JSON list. Settings come as one JSON object in
the first argument.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from sffn_bench import one_layer, rows
from sffn_bench.naive_split import NaiveMLP
from sffn_dist import strict_json
from sffn_dist.parallel import topology
from sffn_dist.parallel.feed_forward import StructuredMLP
from sffn_dist.parallel.layer_spec import structured_mlp_submodules
from sffn_dist.structured.registry import build_structure
from sffn_dist.structured.structure import Structure


def providers(
    structure: Structure, h: int, f: int, sequence: bool, ranks: topology.Topology
) -> dict[str, nn.Module]:
    """The same layer by each provider, with small random weights."""
    config = one_layer.transformer(h, f, ranks.tensor_parallel_size, sequence)
    structured = structured_mlp_submodules(structure.kind, rank=structure.rank, blocks=structure.blocks)
    layers: dict[str, nn.Module] = {
        "dense": one_layer.dense(config),
        "naive": NaiveMLP(structure, h, f, config, ranks.tensor_parallel_size, ranks.tensor_parallel_rank),
        "bottleneck": StructuredMLP(config, structured, ffn_hidden_size=f),
        "recomputed": StructuredMLP(config, structured, ffn_hidden_size=f, recompute="bottleneck"),
    }
    one_layer.draw(layers.values(), ranks.device)
    return layers


def measure(
    structure: Structure, sequence: bool, settings: dict[str, Any], ranks: topology.Topology
) -> list[dict[str, Any]]:
    """Rows of one structure, with or without sequence parallelism."""
    h, f, tokens = settings["width"], settings["inner"], settings["tokens"]
    sequence = sequence and ranks.tensor_parallel_size > 1
    config = one_layer.transformer(h, f, ranks.tensor_parallel_size, sequence)
    rows_here = tokens // ranks.tensor_parallel_size if sequence else tokens
    x = torch.randn(rows_here, 1, h, dtype=config.params_dtype, device=ranks.device).requires_grad_()
    layers = providers(structure, h, f, sequence, ranks)
    cases = {name: one_layer.timed(layer, x, ranks.device) for name, layer in layers.items()}
    times = rows.interleaved(cases, settings["repeats"])
    medians = {name: statistics.median(some) for name, some in times.items()}
    sizes = {"rank": structure.rank, "blocks": structure.blocks}
    shape = {
        "kind": structure.kind,
        "p": ranks.tensor_parallel_size,
        "sequence": sequence,
        "tokens": tokens,
        "h": h,
        "f": f,
        **sizes,
    }
    return [
        rows.row(
            "ffn_tensor_parallel",
            name,
            "fwd+bwd",
            {**shape, "dtype": str(config.params_dtype).removeprefix("torch.")},
            some,
            speedup_over_dense=round(medians["dense"] / medians[name], 2),
            speedup_over_naive=round(medians["naive"] / medians[name], 2),
        )
        for name, some in times.items()
    ]


def main() -> None:
    """All structures, with and without sequence parallelism."""
    settings = json.loads(sys.argv[1])
    ranks = one_layer.start(settings["threads"])
    structures = [build_structure(**one) for one in settings["structures"]]
    found = [
        row
        for structure, sequence in itertools.product(structures, settings["sequence"])
        for row in measure(structure, sequence, settings, ranks)
    ]
    if ranks.is_rank_zero:
        print(strict_json.dumps(found), flush=True)
    dist.barrier()
    topology.destroy()


if __name__ == "__main__":
    main()
