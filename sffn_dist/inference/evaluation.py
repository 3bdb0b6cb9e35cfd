"""Held-out loss, perplexity and bits per byte."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from sffn_dist.parallel.topology import Topology


@dataclass(frozen=True)
class EvaluationResult:
    """Over ``tokens`` predicted tokens that stand for ``bytes`` bytes of text; ``loss`` in nats a token.

    ``bytes_estimated``: they were not counted when the text was encoded.
    """

    loss: float
    tokens: int
    bytes: int
    bytes_estimated: bool = False

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float:
        """loss / ln 2 * tokens / bytes: comparable between tokenizers."""
        return self.loss / math.log(2) * self.tokens / max(1, self.bytes)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    token_losses: Callable[[Any, Tensor, Tensor], Tensor],
    windows: NDArray[np.int64],
    text_bytes: int,
    micro_batch: int,
    topology: Topology,
    *,
    bytes_estimated: bool = False,
) -> EvaluationResult:
    """Mean loss over ``windows`` (n, S+1), shared among the data-parallel ranks; their labels stand for
    ``text_bytes`` bytes of text.

    Every rank does the same number of forward passes (ZeRO-3 gathers weights in each): missing rows repeat
    the first window, weight 0.
    """
    was_training = model.training
    model.eval()
    per_rank = math.ceil(len(windows) / topology.data_parallel_size)
    own_rows = range(topology.data_parallel_rank * per_rank, (topology.data_parallel_rank + 1) * per_rank)
    nats = torch.zeros((), dtype=torch.float64)
    for start in range(0, per_rank, micro_batch):
        rows = list(own_rows[start : start + micro_batch])
        batch = torch.from_numpy(windows[[row if row < len(windows) else 0 for row in rows]]).to(
            topology.device
        )
        losses = (
            token_losses(model, batch[:, :-1].contiguous(), batch[:, 1:].contiguous())
            .double()
            .sum(dim=1)
            .cpu()
        )
        weight = torch.tensor([row < len(windows) for row in rows], dtype=torch.float64)
        nats += (losses * weight).sum()
    total = nats.to(topology.device)
    if topology.data_parallel_size > 1:
        dist.all_reduce(total, group=topology.data_group)
    model.train(was_training)
    labels = int(windows[:, 1:].size)
    return EvaluationResult(float(total) / labels, labels, text_bytes, bytes_estimated)
