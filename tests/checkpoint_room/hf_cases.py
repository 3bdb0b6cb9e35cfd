"""What a Megatron GPTModel of this project computes; called inside a rank of a pool."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from sffn_dist import model as models
from sffn_dist.parallel import cpu_compat, topology
from sffn_dist.parallel.split import shard
from sffn_dist.spec import loading
from sffn_dist.spec.split_table import model_tensors


@torch.no_grad()
def logits(
    tree: dict[str, Any],
    tensors: dict[str, NDArray[np.float32]],
    guide: bool,
    alpha: float,
    tokens: NDArray[np.int64],
) -> NDArray[np.float32]:
    """Logits (batch, S, vocab) in fp32, every parameter set by name."""
    config = loading.from_tree(tree)
    cpu_compat.prepare()
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    model = models.build(config, "fp32", topology.groups(1), guide=guide)
    parameters = dict(model.named_parameters())
    assert parameters.keys() == tensors.keys()
    for name, parameter in parameters.items():
        parameter.copy_(torch.from_numpy(tensors[name]))
    models.mix_guide(model, alpha)
    model.eval()
    return models.token_logits(model, torch.from_numpy(tokens)).numpy()


@torch.no_grad()
def losses(
    tree: dict[str, Any], tensors: dict[str, NDArray[np.float32]], tokens: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Cross-entropy (batch, S - 1) on this rank of the tree's tensor-parallel group."""
    config = loading.from_tree(tree)
    cpu_compat.prepare()
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    groups = topology.groups(config.parallel.tensor)
    model = models.build(config, "fp32", groups, guide=False)
    specs = model_tensors(config, guide=False)
    for name, parameter in model.named_parameters():
        full = torch.from_numpy(tensors[name])
        parameter.copy_(shard(full, specs[name], groups.tensor_parallel_size, groups.tensor_parallel_rank))
    model.eval()
    ids = torch.from_numpy(tokens)
    return models.token_losses(model, ids[:, :-1].contiguous(), ids[:, 1:].contiguous()).numpy()
