"""One rank of the tensor-parallel benchmark: forward + backward of one feed-forward layer, by provider.

    dense        Megatron's MLP: column-parallel, row-parallel
    naive        each pair of factors as a Megatron column-row pair
    bottleneck   ours: only the bottleneck travels
    recomputed   ours, keeping only the bottlenecks for backward

Started by ``tools/bench.py tp``; rank 0 prints the rows as one JSON list. Settings come as one JSON object in the first argument.
"""

from __future__ import annotations

import functools
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

# kernels/, also where PYTHONSAFEPATH keeps the script's own folder out
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import rows
from bench.naive_split import NaiveMLP

from sffn_dist.parallel import host, topology
from sffn_dist.parallel.feed_forward import StructuredMLP
from sffn_dist.parallel.layer_spec import structured_mlp_submodules
from sffn_dist.shapes import Structure


def transformer(h: int, f: int, ranks: int, sequence: bool) -> TransformerConfig:
    """Megatron's settings of a GELU feed-forward layer without biases."""
    return TransformerConfig(
        num_layers=1,
        hidden_size=h,
        ffn_hidden_size=f,
        num_attention_heads=ranks,
        activation_func=functools.partial(F.gelu, approximate="tanh"),
        add_bias_linear=False,
        bias_activation_fusion=False,
        gradient_accumulation_fusion=False,
        params_dtype=torch.bfloat16 if host.has_cuda() else torch.float32,
        bf16=host.has_cuda(),
        tensor_model_parallel_size=ranks,
        sequence_parallel=sequence,
        use_cpu_initialization=not host.has_cuda(),
        perform_initialization=False,
    )


def providers(structure: Structure, h: int, f: int, sequence: bool, ranks: topology.Topology) -> dict[str, nn.Module]:
    """The same layer by each provider, with small random weights."""
    config = transformer(h, f, ranks.tensor, sequence)
    structured = structured_mlp_submodules(structure.kind, rank=structure.rank, blocks=structure.blocks)
    dense = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    layers: dict[str, nn.Module] = {
        "dense": MLP(config, dense, ffn_hidden_size=f),
        "naive": NaiveMLP(structure, h, f, config, ranks.tensor, ranks.tensor_rank),
        "bottleneck": StructuredMLP(config, structured, ffn_hidden_size=f),
        "recomputed": StructuredMLP(config, structured, ffn_hidden_size=f, recompute="bottleneck"),
    }
    for layer in layers.values():
        layer.to(ranks.device)
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.02)
    return layers


def timed(layer: nn.Module, x: torch.Tensor, device: torch.device) -> Callable[[], float]:
    """A function that runs forward + backward once, all ranks together, and returns the seconds."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier()

    def once() -> float:
        for parameter in layer.parameters():
            parameter.grad = None
        x.grad = None
        wait()
        start = time.perf_counter()
        y = layer(x)[0]
        y.backward(x.detach())
        wait()
        return time.perf_counter() - start

    return once


def measure(structure: Structure, sequence: bool, settings: dict[str, Any], ranks: topology.Topology) -> list[dict[str, Any]]:
    """Rows of one structure, with or without sequence parallelism."""
    h, f, tokens = settings["width"], settings["inner"], settings["tokens"]
    sequence = sequence and ranks.tensor > 1
    config = transformer(h, f, ranks.tensor, sequence)
    rows_here = tokens // ranks.tensor if sequence else tokens
    x = torch.randn(rows_here, 1, h, dtype=config.params_dtype, device=ranks.device).requires_grad_()
    layers = providers(structure, h, f, sequence, ranks)
    cases = {name: timed(layer, x, ranks.device) for name, layer in layers.items()}
    times = rows.interleaved(cases, settings["repeats"])
    medians = {name: statistics.median(some) for name, some in times.items()}
    sizes = {"rank": structure.rank, "blocks": structure.blocks}
    shape = {"kind": structure.kind, "p": ranks.tensor, "sequence": sequence, "tokens": tokens, "h": h, "f": f, **sizes}
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
    host.prepare()
    torch.set_num_threads(1)
    dist.init_process_group("nccl" if host.has_cuda() else "gloo")
    ranks = topology.groups(dist.get_world_size())
    torch.manual_seed(ranks.rank)
    structures = [Structure(**one) for one in settings["structures"]]
    found = [
        row
        for structure, sequence in itertools.product(structures, settings["sequence"])
        for row in measure(structure, sequence, settings, ranks)
    ]
    if ranks.main:
        print(json.dumps(found), flush=True)
    dist.barrier()
    topology.stop()


if __name__ == "__main__":
    main()
