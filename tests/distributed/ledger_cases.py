"""Pieces of training steps with the ledger open, on whatever ranks there are; called inside the ranks of a
pool.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sffn_dist import model as models
from sffn_dist.parallel import cpu_compat, topology
from sffn_dist.parallel.ledger import Ledger, LedgerEntry, purpose
from sffn_dist.spec import loading
from sffn_dist.spec import schedule as schedules
from sffn_dist.training import engine as engines


def _join(tensor: int) -> topology.Topology:
    cpu_compat.prepare()
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return topology.groups(tensor)


def _open(model: nn.Module, ranks: topology.Topology) -> Ledger:
    return Ledger(model, {"tensor": ranks.tensor_group, "data": ranks.data_group})


class _FeedForward(nn.Module):
    """Megatron's own linears, one after the other."""

    def __init__(self, h: int, f: int, sequence: bool):
        super().__init__()
        config = ModelParallelConfig(
            tensor_model_parallel_size=2, sequence_parallel=sequence, use_cpu_initialization=True
        )
        options: dict[str, Any] = {
            "config": config,
            "init_method": nn.init.ones_,
            "bias": False,
            "skip_bias_add": False,
        }
        self.linear_fc1 = ColumnParallelLinear(h, f, **options)
        self.linear_fc2 = RowParallelLinear(f, h, input_is_parallel=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_fc2(self.linear_fc1(x)[0])[0]


def megatron_linears(h: int, f: int, rows: int, batch: int, sequence: bool) -> list[LedgerEntry]:
    """A forward and a backward over ``rows`` x ``batch`` tokens."""
    ranks = _join(2)
    model = _FeedForward(h, f, sequence)
    x = torch.randn(rows // (ranks.tensor_parallel_size if sequence else 1), batch, h, requires_grad=True)
    with _open(model, ranks) as ledger:
        model(x).sum().backward()
    return ledger.entries


def model_step(tree: dict[str, Any]) -> tuple[list[LedgerEntry], list[str]]:
    """A GPTModel's forward and backward: the rows, and the names of what the ledger changed in loss and
    gradients.
    """
    config = loading.from_tree(tree)
    ranks = _join(config.parallel.tensor)
    model = models.build(config, "fp32", ranks, guide=schedules.build_schedule(config).guided(0))
    models.initialise(model, config, ranks)
    tokens = torch.randint(
        0, config.model.vocab, (2, config.model.sequence + 1), generator=torch.Generator().manual_seed(2)
    )
    ledger = _open(model, ranks)
    results: list[dict[str, Tensor]] = []
    for watched in (contextlib.nullcontext(), ledger, contextlib.nullcontext()):
        model.zero_grad()
        with watched:
            loss = models.token_losses(model, tokens[:, :-1], tokens[:, 1:]).mean()
            loss.backward()
        results.append(
            {
                "loss": loss.detach(),
                **{name: p.grad for name, p in model.named_parameters() if p.grad is not None},
            }
        )
    changed = [
        name
        for name in results[0]
        if not all(torch.equal(results[0][name], other[name]) for other in results[1:])
    ]
    hooked = [
        name for name, module in model.named_modules() if module._forward_hooks or module._forward_pre_hooks
    ]
    return ledger.entries, changed + hooked


def engine_step(tree: dict[str, Any], precision: str = "fp32") -> tuple[list[LedgerEntry], dict[str, int]]:
    """An optimiser step of the engine; the rows, and the elements of every parameter of the rank."""
    config = loading.from_tree(tree)
    ranks = _join(config.parallel.tensor)
    model = models.build(config, precision, ranks, guide=schedules.build_schedule(config).guided(0))
    models.initialise(model, config, ranks)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    engine = engines.create(model, config, precision, ranks)
    clock = schedules.build_schedule(config)
    models.set_guide(model, clock, clock.at(0))
    tokens = torch.from_numpy(np.arange(2 * (config.model.sequence + 1)).reshape(2, -1) % config.model.vocab)

    def loss(batch: Tensor) -> Tensor:
        return models.token_losses(engine, batch[:, :-1].contiguous(), batch[:, 1:].contiguous()).mean()

    with _open(model, ranks) as ledger:
        engines.train_batch(engine, loss, iter([tokens]), config.train.clip)
    engines.destroy(engine)
    return ledger.entries, sizes


def _exchanges(rank: int) -> dict[str, Callable[[], Any]]:
    """One collective a name, on two ranks."""
    float32, own, none = torch.zeros(6), torch.zeros(5), torch.zeros(0, 3)
    world, parts = dist.group.WORLD, [torch.zeros(5), torch.zeros(5)]
    uneven = ([1, 2], [1, 1]) if rank == 0 else ([1, 2], [2, 2])  # rows from, rows to each rank
    return {
        "all_reduce": lambda: dist.all_reduce(float32),
        "async": lambda: dist.all_reduce(float32, async_op=True).wait(),
        "bf16": lambda: dist.all_reduce(float32.bfloat16()),
        "coalesced": lambda: _coalesced(dist.all_reduce, [torch.zeros(3)], [torch.zeros(4)]),
        "coalesced_all_gather": lambda: _coalesced(
            dist.all_gather_into_tensor, [torch.zeros(10), own], [torch.zeros(12), float32]
        ),
        "coalesced_reduce_scatter": lambda: _coalesced(dist.reduce_scatter_tensor, [own, torch.zeros(10)]),
        "all_gather": lambda: dist.all_gather(parts, own),
        "all_gather_into_tensor": lambda: dist.all_gather_into_tensor(torch.zeros(10), own),
        "reduce_scatter_tensor": lambda: dist.reduce_scatter_tensor(own, torch.zeros(10)),
        "reduce_scatter": lambda: dist.reduce_scatter(own, parts),
        "all_to_all_even": lambda: dist.all_to_all_single(torch.zeros(4, 3), torch.zeros(4, 3)),
        "all_to_all_uneven": lambda: dist.all_to_all_single(
            torch.zeros(sum(uneven[0]), 3), torch.zeros(sum(uneven[1]), 3), *uneven
        ),
        "all_to_all_empty": lambda: dist.all_to_all_single(none.clone(), none, [0, 0], [0, 0]),
        "broadcast": lambda: dist.broadcast(own, 0),
        "scatter": lambda: dist.scatter(own, parts if rank == 0 else None, 0),
        "gather": lambda: dist.gather(own, parts if rank == 1 else None, 1),
        "reduce": lambda: dist.reduce(own, 1),
        "send": lambda: dist.send(own, 1) if rank == 0 else dist.recv(own, 0),
        "barrier": dist.barrier,
        "functional_all_reduce": lambda: functional.all_reduce(float32, "sum", world).sum(),
        "functional_all_gather": lambda: functional.all_gather_tensor(own, 0, world).sum(),
        "functional_reduce_scatter": lambda: functional.reduce_scatter_tensor(float32, "sum", 0, world).sum(),
        "functional_all_to_all": lambda: functional.all_to_all_single(
            torch.zeros(sum(uneven[1]), 3), *uneven, world
        ).sum(),
        "functional_broadcast": lambda: functional.broadcast(own, 0, world).sum(),
    }


def _coalesced(collective: Callable[..., Any], *calls: list[Tensor]) -> None:
    with dist._coalescing_manager():
        for tensors in calls:
            collective(*tensors)


def each_collective() -> dict[str, list[LedgerEntry]]:
    """The rows of every collective by itself, outside of any module."""
    ranks = _join(2)
    rows = {}
    for name, exchange in _exchanges(ranks.rank).items():
        with Ledger(nn.Identity(), {}) as ledger:
            exchange()
        rows[name] = ledger.entries
    return rows


def labels() -> tuple[list[LedgerEntry], str]:
    """Two groups of the same ranks under two labels; a group that two labels name."""
    ranks = _join(2)
    with Ledger(nn.Identity(), {"tensor": ranks.tensor_group, "all": dist.group.WORLD}) as ledger:
        dist.all_reduce(torch.zeros(2), group=ranks.tensor_group)
        dist.all_reduce(torch.zeros(4))
    try:
        Ledger(nn.Identity(), {"tensor": ranks.tensor_group, "model": ranks.tensor_group})
    except ValueError as error:
        return ledger.entries, str(error)
    return ledger.entries, ""


def unknown() -> str:
    """What a collective that the ledger cannot count says."""
    ranks = _join(2)
    with Ledger(nn.Identity(), {}):
        try:
            torch.ops._c10d_functional.isend(torch.zeros(2), 0, 0, ranks.tensor_group.group_name)
        except NotImplementedError as error:
            return str(error)
    return ""


class _SumBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor:
        total = grads[0].clone()
        dist.all_reduce(total)
        return total


class _Leaf(nn.Module):
    """Sums in forward, sums the gradient in backward, both inside the module; the weight's hook sums its
    gradient.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.weight.register_hook(self.sum_gradient)

    def sum_gradient(self, gradient: Tensor) -> Tensor:
        with purpose("gradient"):
            dist.all_reduce(gradient.clone())
        return gradient

    def forward(self, x: Tensor) -> Tensor:
        dist.all_reduce(x.detach().clone())
        return _SumBackward.apply(x.sin() * self.weight)


class _Nest(nn.Module):
    """``outer`` sums before and after it calls ``inner``, whose forward may be recomputed in backward."""

    def __init__(self, recompute: bool | None):
        super().__init__()
        self.inner, self.recompute = _Leaf(), recompute

    def forward(self, x: Tensor) -> Tensor:
        y = _SumBackward.apply(x)
        y = (
            self.inner(y)
            if self.recompute is None
            else checkpoint(self.inner, y, use_reentrant=self.recompute)
        )
        dist.all_reduce(torch.zeros(3))
        return _SumBackward.apply(y)


def nested(recompute: bool | None) -> list[LedgerEntry]:
    """Places and purposes in a module within a module; recompute: None, or whether the checkpoint is
    reentrant.
    """
    _join(2)
    model = nn.ModuleDict({"outer": _Nest(recompute)})
    x = torch.ones(4, requires_grad=True)
    with Ledger(model, {"all": dist.group.WORLD}) as ledger:
        y = model["outer"](x)
        dist.all_reduce(torch.zeros(2))
        y.sum().backward()
    return ledger.entries


class _Refuses(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("refused")


def exception() -> tuple[int, list[LedgerEntry]]:
    """An exception in a module's forward: the hooks left behind, and what a collective after it, still in
    the ledger, is called.
    """
    _join(2)
    model = nn.Sequential(nn.Identity(), _Refuses())
    ledger = Ledger(model, {"all": dist.group.WORLD})
    with contextlib.suppress(KeyError), ledger:
        with contextlib.suppress(ValueError):
            model(torch.ones(1))
        dist.all_reduce(torch.zeros(2))
        raise KeyError
    dist.all_reduce(torch.zeros(2))
    left = sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._forward_hooks_always_called)
        for m in model.modules()
    )
    return left, ledger.entries
