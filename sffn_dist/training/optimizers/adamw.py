"""AdamW; weight decay applies to every parameter, biases and norms included (paper, appendix)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from sffn_dist.spec.config import Train


def adamw(groups: Sequence[Sequence[nn.Parameter]], train: Train) -> torch.optim.Optimizer:
    """Torch's fused AdamW over parameter groups; the learning rate is set before each step."""
    return torch.optim.AdamW(
        [{"params": list(group)} for group in groups],
        lr=0.0,
        betas=(train.beta1, train.beta2),
        eps=train.epsilon,
        weight_decay=train.weight_decay,
        fused=True,
    )
