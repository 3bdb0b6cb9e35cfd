"""A sample of text from a model in training, on all its ranks."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from sffn_kernels import dispatch
from sffn_kernels.timing import ASSUMED
from torch import Tensor, nn

from sffn_dist.parallel.feed_forward import StructuredMLP
from sffn_dist.parallel.topology import Topology

_log = logging.getLogger(__name__)
LEAST_LENGTH = 64  # positions: what the kernels of a decoding step take at most
KERNELS = 4  # that a structured layer starts at most, of one size


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

    Contexts are padded to few lengths (:func:`length_of`), and no kernel is timed: each length may be another
    size to a kernel, which would be compiled and timed for a handful of uses.
    """
    was_training = model.training
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    ids, longest = list(prompt), min(context, len(prompt) + tokens - 1)
    parts = topology.tensor_parallel_size  # sequence parallelism needs equal ones
    lengths = {length_of(own, longest, parts) for own in range(min(len(prompt), longest), longest + 1)}
    if tokens:
        _log.info("%s", announced(model, tokens, sorted(lengths)))
    for _ in range(tokens):
        window = ids[-context:]
        padded = length_of(len(window), longest, parts)
        batch = torch.tensor([window + [0] * (padded - len(window))], device=topology.device)
        # what stands right of it is not seen by causal attention
        with dispatch.unmeasured():
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


def length_of(own: int, longest: int, parts: int) -> int:
    """Positions that a context of ``own`` tokens is padded to, in equal parts: a power of two from
    LEAST_LENGTH on, at most the ``longest`` context.
    """
    length = min(longest, max(LEAST_LENGTH, 1 << (own - 1).bit_length()))
    return math.ceil(length / parts) * parts


def announced(model: nn.Module, tokens: int, lengths: list[int]) -> str:
    """What a sample computes, how many kernels are compiled for it, and about how long that takes."""
    positions = " or ".join(map(str, lengths))
    what = f"sample: {tokens} tokens, each from {positions} positions; no kernel is timed for it"
    structured = any(isinstance(module, StructuredMLP) for module in model.modules())
    if not (structured and dispatch.prefers_kernels()):
        return f"{what}, or compiled: its structured layers are plain torch"
    kernels = KERNELS * len(lengths)
    return f"{what}, at most {kernels} are compiled, in about {kernels * ASSUMED:.0f} s (assumed)"


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
