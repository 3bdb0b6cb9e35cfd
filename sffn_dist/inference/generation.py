"""A sample of text from a model in training, on all its ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sffn_dist.parallel.topology import Topology


@torch.no_grad()
def sample(
    model: nn.Module,
    logits: Callable[[Any, Tensor], Tensor],
    prompt: list[int],
    tokens: int,
    *,
    context: int,
    vocab: int,
    temperature: float,
    seed: int,
    topology: Topology,
    stop: int | None = None,
) -> list[int]:
    """``prompt`` and up to ``tokens`` more ids (fewer at ``stop``); temperature 0 takes the likeliest.

    ``logits(model, ids (1, s))`` gives this rank's (1, s, vocab/p) slice. The context is computed anew for
    every token: fine for a sample of some dozens. Every rank must call it: ids from ``vocab`` on (rows that
    no token uses) are never drawn.
    """
    was_training = model.training
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    ids = list(prompt)
    for _ in range(tokens):
        window = ids[-context:]
        # sequence parallelism needs equal parts
        padded = math.ceil(len(window) / topology.tensor_parallel_size) * topology.tensor_parallel_size
        batch = torch.tensor([window + [0] * (padded - len(window))], device=topology.device)
        # what stands right of it is not seen by causal attention
        local = logits(model, batch)[0, len(window) - 1].float()
        full = _gather(local, topology)[:vocab].cpu()
        following = torch.tensor([_draw(full, temperature, generator)], device=topology.device)
        if topology.world_size > 1:
            dist.broadcast(following, src=0)
        ids.append(int(following))
        if ids[-1] == stop:
            break
    model.train(was_training)
    return ids


def _gather(local: Tensor, topology: Topology) -> Tensor:
    if topology.tensor_parallel_size == 1:
        return local
    full = local.new_empty(local.numel() * topology.tensor_parallel_size)
    dist.all_gather_into_tensor(full, local.contiguous(), group=topology.tensor_group)
    return full


def _draw(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    if temperature == 0.0 or not torch.isfinite(logits).all():
        return int(logits.argmax())
    return int(torch.multinomial(torch.softmax(logits / temperature, dim=-1), 1, generator=generator))
