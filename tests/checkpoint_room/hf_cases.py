"""What a Megatron GPTModel of this project computes; called inside a rank of a pool."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from sffn_dist import model as models
from sffn_dist.parallel import cpu_compat, topology
from sffn_dist.spec import loading


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
