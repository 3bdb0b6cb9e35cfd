"""Logits of imported weights in this project's own model; called inside the ranks of a pool."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from sffn_dist import model as models
from sffn_dist.parallel import cpu_compat, topology
from sffn_dist.parallel.split import shard
from sffn_dist.spec.split_table import model_tensors


def logits(importer: str, path: str, tokens: np.ndarray, overrides: tuple[str, ...] = ()) -> Any:
    """(Logits (batch, S, vocab), facts) of what ``sffn_dist.conversion.<importer>.read`` reads."""
    weights = importlib.import_module(f"sffn_dist.conversion.{importer}").read(Path(path), overrides)
    cpu_compat.prepare()
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    ranks = topology.groups(weights.config.parallel.tensor)
    model = models.build(weights.config, "fp32", ranks, guide=weights.guide)
    specs = model_tensors(weights.config, guide=weights.guide)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            full = weights.full(name)
            assert full.dtype == torch.float32
            parameter.copy_(shard(full, specs[name], ranks.tensor_parallel_size, ranks.tensor_parallel_rank))
        models.mix_guide(model, weights.alpha)
        found = models.token_logits(model, torch.from_numpy(tokens))
    return found.numpy()
