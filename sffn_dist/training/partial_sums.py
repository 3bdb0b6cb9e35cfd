"""The sum over the tensor-parallel group of gradients that its ranks hold in part, once a step.

It is made where the engine keeps gradients, after its last micro-step and before the norm is taken. Sums over
micro-steps, over data-parallel ranks and over tensor-parallel ranks may be taken in any order: this one comes
last, so it is in fp32, and in ZeRO 2 and 3 of this rank's fragments alone. A parameter that every
rank of the group holds has the same fragment on each of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sffn_dist.parallel.collectives import sum_gradient

Engine = Any  # deepspeed.DeepSpeedEngine, which is not typed
BUCKET = 25_000_000  # elements of one sum, so that its buffer is at most 100 MB


def sum_partial(engine: Engine, parameters: Iterable[nn.Parameter]) -> None:
    """Complete the gradients of these parameters.

    All ranks of the tensor-parallel group must call it.
    """
    wanted = {id(parameter) for parameter in parameters}
    held = [gradient for parameter, gradient in _held(engine) if id(parameter) in wanted]
    for bucket in _buckets(held):
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
        group = engine.mpu.get_tensor_model_parallel_group()
        parts = sum_gradient(flat, group).wait().split([gradient.numel() for gradient in bucket])
        torch._foreach_copy_(bucket, [part.view(old.shape) for part, old in zip(parts, bucket, strict=True)])


def _held(engine: Engine) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """What this rank holds of each parameter's gradient, averaged over the data-parallel ranks."""
    optimizer = engine.optimizer
    if isinstance(optimizer, torch.optim.Optimizer):  # stage 0
        yield from ((p, p.grad) for p in engine.module.parameters() if p.grad is not None)
    elif hasattr(optimizer, "fp32_groups_gradients"):  # stage 1 in bf16: whole, in fp32
        for group, gradients in zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients, strict=True):
            yield from ((p, part.view(p.shape)) for p, part in zip(group, gradients, strict=True))
    else:
        stage_3 = hasattr(optimizer, "fp32_partitioned_groups_flat")
        groups = optimizer.fp16_groups if stage_3 else optimizer.params_in_partition
        for index, group in enumerate(groups):
            parts = [
                part
                for part in optimizer.averaged_gradients[index]
                if not getattr(part, "_zero_padding", False)
            ]
            yield from zip(group, parts, strict=False)  # without parameters: a part of zeros


def _buckets(gradients: list[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for gradient in gradients:
        if bucket and sum(other.numel() for other in bucket) + gradient.numel() > BUCKET:
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket
