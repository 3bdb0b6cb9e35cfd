"""Optimizers by the value of ``train.optimizer``: the ``module:function`` that makes each. Imports no torch.

Another optimizer is a file in training/optimizers/ and a line here. Checkpoints, ZeRO and phases hold of each
parameter an fp32 weight, two moments named exp_avg and exp_avg_sq, and a count of steps: an optimizer keeps
these.
"""

from __future__ import annotations

OPTIMIZERS: dict[str, str] = {
    "adamw": "sffn_dist.training.optimizers.adamw:adamw",
}
