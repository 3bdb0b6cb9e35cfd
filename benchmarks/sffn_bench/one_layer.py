"""What every timing of one feed-forward layer shares: the ranks, Megatron's settings, the dense layer, one
timed pass.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore

from sffn_dist.parallel import cpu_compat, topology


def start(threads: int) -> topology.Topology:
    """Join the ranks that the launcher started, all of them tensor-parallel; ``threads`` for each."""
    cpu_compat.prepare()
    torch.set_num_threads(threads)
    dist.init_process_group("nccl" if cpu_compat.has_cuda() else "gloo")
    ranks = topology.groups(dist.get_world_size())
    torch.manual_seed(ranks.rank)
    return ranks


def alone(threads: int) -> topology.Topology:
    """Be the one rank of a process without a launcher."""
    cpu_compat.prepare()
    torch.set_num_threads(threads)
    dist.init_process_group(
        "nccl" if cpu_compat.has_cuda() else "gloo", store=HashStore(), rank=0, world_size=1
    )
    torch.manual_seed(0)
    return topology.groups(1)


def transformer(h: int, f: int, ranks: int, sequence: bool, *, bias: bool = False) -> TransformerConfig:
    """Megatron's settings of a GELU feed-forward layer."""
    return TransformerConfig(
        num_layers=1,
        hidden_size=h,
        ffn_hidden_size=f,
        num_attention_heads=ranks,
        activation_func=functools.partial(F.gelu, approximate="tanh"),
        add_bias_linear=bias,
        bias_activation_fusion=False,
        gradient_accumulation_fusion=False,
        params_dtype=torch.bfloat16 if cpu_compat.has_cuda() else torch.float32,
        bf16=cpu_compat.has_cuda(),
        tensor_model_parallel_size=ranks,
        sequence_parallel=sequence,
        use_cpu_initialization=not cpu_compat.has_cuda(),
        perform_initialization=False,
    )


def dense(config: TransformerConfig) -> MLP:
    """Megatron's MLP: column-parallel, row-parallel."""
    submodules = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    return MLP(config, submodules, ffn_hidden_size=config.ffn_hidden_size)


def draw(layers: Iterable[nn.Module], device: torch.device) -> None:
    """Put the layers on the device and give them small random weights."""
    for layer in layers:
        layer.to(device)
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.02)


def timed(layer: nn.Module, x: Tensor, device: torch.device) -> Callable[[], float]:
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
