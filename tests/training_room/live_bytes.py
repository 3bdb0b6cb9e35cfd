"""Peak of live bytes of a rank's model in one micro-batch, counted on fake tensors: nothing is computed, and
a model of any size takes seconds on any machine.

The model is the one that a run builds (model.build), on the CPU, as rank 0 of a tensor-parallel group whose
collectives return at once (torch's ``fake`` process group). Gradients stand before the micro-batch begins, as
in every micro-step after the first: each is added to in place.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sffn_dist import model as models
from sffn_dist.parallel import cpu_compat, layers
from sffn_dist.parallel import topology as topologies
from sffn_dist.spec.config import Config
from sffn_dist.spec.loading import load


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operations made and that still exist: ``now``, and the ``peak`` so far.

    Views and operations in place share a storage, which counts once, until the last tensor of it is gone: one
    that autograd saved counts.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak, self.at_peak = 0, 0, ""
        self._living: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        if self.now > self.peak:
            self.peak, self.at_peak = self.now, str(func)
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._living:
            return
        size = storage.nbytes()

        def gone(_: Any) -> None:
            del self._living[key]
            self.now -= size

        self._living[key] = weakref.ref(storage, gone)
        self.now += size


def measure(
    path: str, overrides: list[str], precision: str, *, guide: bool = False, cuda: bool = False
) -> dict[str, Any]:
    """Bytes that tensor-parallel rank 0 holds: ``weights``, ``gradients``, and ``activations``, all else at
    the peak.

    ``guide``: every linear computes its own. ``cuda``: RMSNorm and attention make and save the tensors that
    they do on CUDA. In a process of its own: it joins a process group that nobody else could use.
    """
    config = load(path, overrides)
    cpu_compat.prepare()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=config.parallel.tensor)
    try:
        with FakeTensorMode(), _cuda_operators() if cuda else contextlib.nullcontext():
            return _measure(config, precision, guide)
    finally:
        topologies.destroy()


def _measure(config: Config, precision: str, guide: bool) -> dict[str, Any]:
    with LiveBytes() as live:
        model = models.build(config, precision, topologies.groups(config.parallel.tensor), guide=guide)
        if guide:
            models.mix_guide(model, 0.5)
        held = [live.now]
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        held.append(live.now)
        live.peak = 0
        tokens = torch.zeros(config.micro_batch_size, config.model.sequence, dtype=torch.long)
        models.token_losses(model, tokens, tokens).mean().backward()
        return {
            "weights": held[0],
            "gradients": held[1] - held[0],
            "activations": live.peak - held[1],
            "at_peak": live.at_peak,
        }


class _FusedRMSNorm(torch.autograd.Function):
    """What aten::_fused_rms_norm makes and saves on CUDA; on a CPU torch takes it apart."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(*x.shape[:-1], 1, dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


@contextlib.contextmanager
def _cuda_operators() -> Iterator[None]:
    norm, attention = layers.Norm.forward, layers.CoreAttention.forward

    def fused(self: Any, x: Tensor) -> Tensor:
        if not self.rms:
            return norm(self, x)
        return _FusedRMSNorm.apply(x, self.weight)

    def flash(self: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **_: Any) -> Tensor:
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, False, scale=self.scale)
        return out[0].permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)

    layers.Norm.forward, layers.CoreAttention.forward = fused, flash  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        layers.Norm.forward, layers.CoreAttention.forward = norm, attention  # type: ignore[method-assign]
