"""One feed-forward layer on one CUDA device, as a script: prints what it keeps for backward, and how far
bf16 is from float64.
"""

from __future__ import annotations

import functools
import json
import sys
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from sffn_dist.parallel import cpu_compat, topology
from sffn_dist.parallel.feed_forward import StructuredMLP
from sffn_dist.parallel.layer_spec import structured_mlp_submodules
from sffn_dist.structured.registry import build_structure
from sffn_dist.structured.structure import Structure

WIDTH, INNER, TOKENS = 1024, 4096, 4096


def layer(structure: Structure, dtype: torch.dtype, recompute: Any) -> MLP:
    """The layer with weights that depend on their names' order alone."""
    config = TransformerConfig(
        num_layers=1,
        hidden_size=WIDTH,
        ffn_hidden_size=INNER,
        num_attention_heads=8,
        activation_func=functools.partial(F.gelu, approximate="tanh"),
        add_bias_linear=False,
        bias_activation_fusion=False,
        params_dtype=dtype,
        use_cpu_initialization=not cpu_compat.has_cuda(),
        perform_initialization=False,
    )
    if structure.kind == "dense":
        made = MLP(
            config,
            MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
            ffn_hidden_size=INNER,
        )
    else:
        linears = structured_mlp_submodules(structure.kind, rank=structure.rank, blocks=structure.blocks)
        made = StructuredMLP(config, linears, ffn_hidden_size=INNER, recompute=recompute)
    generator = torch.Generator().manual_seed(1)
    for parameter in made.parameters():
        drawn = torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
        parameter.data.copy_(drawn.bfloat16())  # the same in both precisions
    return made.to(cpu_compat.device())


def run(made: MLP, dtype: torch.dtype) -> tuple[list[torch.Tensor], int]:
    """[output, gradients of x and of the weights], and the bytes kept for backward beside x."""
    generator = torch.Generator().manual_seed(2)
    x, sent = (
        torch.randn(TOKENS, 1, WIDTH, generator=generator).bfloat16().to(cpu_compat.device(), dtype)
        for _ in range(2)
    )
    x.requires_grad_()
    cuda = cpu_compat.has_cuda()
    before = torch.cuda.memory_allocated() if cuda else 0
    y = made(x)[0]
    kept = (torch.cuda.memory_allocated() if cuda else 0) - before - y.nbytes
    y.backward(sent)
    return [y.detach(), x.grad, *[parameter.grad for parameter in made.parameters()]], kept


def main() -> None:
    """A line of JSON for the structure that the arguments name."""
    structure = build_structure(**json.loads(sys.argv[1]))
    cpu_compat.prepare()
    backend = "nccl" if cpu_compat.has_cuda() else "gloo"
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    topology.groups(1)
    run(layer(structure, torch.bfloat16, "none"), torch.bfloat16)  # libraries' workspaces
    _, dense = run(layer(build_structure("dense"), torch.bfloat16, "none"), torch.bfloat16)
    low, usual = run(layer(structure, torch.bfloat16, "none"), torch.bfloat16)
    rebuilt, narrow = run(layer(structure, torch.bfloat16, "bottleneck"), torch.bfloat16)
    high, _ = run(layer(structure, torch.float64, "none"), torch.float64)
    errors = [
        ((a.double() - b).square().mean() / b.square().mean()).sqrt().item()
        for a, b in zip(low, high, strict=True)
    ]
    x = TOKENS * WIDTH * 2  # kept in any case, and made outside
    found = {"dense": dense + x, "none": usual + x, "bottleneck": narrow + x, "error": max(errors)}
    print(json.dumps({**found, "equal": all(torch.equal(a, b) for a, b in zip(low, rebuilt, strict=True))}))
    topology.destroy()


if __name__ == "__main__":
    main()
