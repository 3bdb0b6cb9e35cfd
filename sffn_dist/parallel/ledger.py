"""The communication ledger: every collective that this rank issues, by kind, group, place in the model and
purpose.

    with Ledger(model, {"tensor": tensor_group, "data": data_group}) as ledger:
        model(x).sum().backward()
    ledger.elements(group="tensor", place="decoder.layers.1.mlp", purpose="forward")

Elements received by one of p ranks; its own do not travel. n counts the elements of what stands in
parentheses:

    all_reduce (tensor)         2 n (p-1)/p: a reduce-scatter, then an all-gather
    all_gather (own part)       n (p-1); of a list: the other ranks' parts
    reduce_scatter (own part)   n (p-1)
    all_to_all (output)         n less the own share
    broadcast, scatter (own)    n, at the source 0
    gather, reduce (own)        n (p-1) at the root, elsewhere 0: what p of them with a root each cost is one
                                all_gather, reduce_scatter
    recv (tensor)               n; send and barrier 0

Collectives are seen where torch.distributed enters torch's dispatcher; what calls a communication library
itself is not.
"""

from __future__ import annotations

import contextlib
import functools
import math
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

Purpose = Literal["forward", "backward", "gradient", "other"]
Counts = list[Fraction | int]  # elements received, a tensor each
# tensors of the first argument, all arguments, p, own rank
Rule = Callable[[list[Tensor], dict[str, Any], int, int], Counts]

_c10d: Any = dist.distributed_c10d  # type: ignore[attr-defined]
_autograd: Any = torch._C._autograd
_functions: Any = torch._C._functions
_MARK: ContextVar[Purpose | None] = ContextVar("purpose", default=None)
_PLACE: ContextVar[nn.Module | None] = ContextVar("place", default=None)


@contextlib.contextmanager
def purpose(name: Purpose) -> Iterator[None]:
    """Collectives issued inside are entered with this purpose, whatever runs them."""
    token = _MARK.set(name)
    try:
        yield
    finally:
        _MARK.reset(token)


@contextlib.contextmanager
def inside(module: nn.Module) -> Iterator[None]:
    """Collectives issued inside are entered at this module's place, though it is not called."""
    token = _PLACE.set(module)
    try:
        yield
    finally:
        _PLACE.reset(token)


# ------------------------------------------------------------------------------ what is received, by operator


def _times(factor: Callable[[int], Fraction | int]) -> Rule:
    return lambda tensors, values, p, rank: [x.numel() * factor(p) for x in tensors]


_SUMMED = _times(lambda p: Fraction(2 * (p - 1), p))
_FROM_OTHERS = _times(lambda p: p - 1)  # of the own part
_SHARE = _times(lambda p: Fraction(p - 1, p))  # of the whole
_WHOLE = _times(lambda p: 1)
_NOTHING = _times(lambda p: 0)


def _parts(tensors: list[Tensor], values: dict[str, Any], p: int, rank: int) -> Counts:
    """One tensor a rank; the ranks that receive nothing of a gather have none."""
    return [0 if i == rank else part.numel() for i, part in enumerate(tensors)]


def _splits(tensors: list[Tensor], values: dict[str, Any], p: int, rank: int) -> Counts:
    rows = values["output_split_sizes"] or [tensors[0].shape[0] // p] * p
    return [(sum(rows) - rows[rank]) * math.prod(tensors[0].shape[1:])]


def _at_root(tensors: list[Tensor], values: dict[str, Any], p: int, rank: int) -> Counts:
    return (_FROM_OTHERS if rank == values["root_rank"] else _NOTHING)(tensors, values, p, rank)


def _from_root(tensors: list[Tensor], values: dict[str, Any], p: int, rank: int) -> Counts:
    return (_NOTHING if rank == values.get("root_rank", values.get("src")) else _WHOLE)(
        tensors, values, p, rank
    )


# kind, rule, operators; c10d's begin with their output, the functional ones have only an input
_C10D: tuple[tuple[str, Rule, str], ...] = (
    ("all_reduce", _SUMMED, "allreduce_ allreduce_coalesced_"),
    ("all_gather", _parts, "allgather_"),
    ("all_gather", _SHARE, "_allgather_base_ allgather_coalesced_ allgather_into_tensor_coalesced_"),
    (
        "reduce_scatter",
        _FROM_OTHERS,
        "reduce_scatter_ _reduce_scatter_base_ reduce_scatter_tensor_coalesced_",
    ),
    ("all_to_all", _parts, "alltoall_"),
    ("all_to_all", _splits, "alltoall_base_"),
    ("broadcast", _from_root, "broadcast_"),
    ("scatter", _from_root, "scatter_"),
    ("gather", _parts, "gather_"),
    ("reduce", _at_root, "reduce_"),
    ("recv", _WHOLE, "recv_ recv_any_source_"),
    ("send", _NOTHING, "send"),
    ("barrier", _NOTHING, "barrier monitored_barrier_"),
)
_FUNCTIONAL: tuple[tuple[str, Rule, str], ...] = (
    ("all_reduce", _SUMMED, "all_reduce all_reduce_ all_reduce_coalesced all_reduce_coalesced_"),
    (
        "all_gather",
        _FROM_OTHERS,
        "all_gather_into_tensor all_gather_into_tensor_out all_gather_into_tensor_coalesced",
    ),
    (
        "reduce_scatter",
        _SHARE,
        "reduce_scatter_tensor reduce_scatter_tensor_out reduce_scatter_tensor_coalesced",
    ),
    ("all_to_all", _splits, "all_to_all_single"),
    ("broadcast", _from_root, "broadcast broadcast_"),
)
_RULES: dict[str, tuple[str, Rule]] = {
    f"{library}::{name}": (kind, rule)
    for library, table in (("c10d", _C10D), ("_c10d_functional", _FUNCTIONAL))
    for kind, rule, names in table
    for name in names.split()
}


class _Collective(NamedTuple):
    kind: str
    rule: Rule
    arguments: list[str]


def _tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [tensor for part in value for tensor in _tensors(part)]


@functools.cache
def _collective(operator: Any) -> _Collective | None:
    """None for what is no collective, that is for an operator that takes no process group; raises
    NotImplementedError.
    """
    schema = operator._schema
    arguments = [argument.name for argument in schema.arguments]
    if schema.name in _RULES:
        return _Collective(*_RULES[schema.name], arguments)
    if {"process_group", "group_name"} & set(arguments):
        raise NotImplementedError(f"the ledger does not know what a rank receives in {schema}")
    return None


def _group(values: dict[str, Any]) -> dist.ProcessGroup:
    group = values["process_group"] if "process_group" in values else values["group_name"]
    if isinstance(group, str):
        resolved: dist.ProcessGroup = _c10d._resolve_process_group(group)
        return resolved
    return group if isinstance(group, dist.ProcessGroup) else dist.ProcessGroup.unbox(group)


# ------------------------------------------------------------------------------------------------- the ledger


@dataclass(frozen=True)
class LedgerEntry:
    """What this rank received in ``calls`` collectives of one kind, group, place and purpose; exact."""

    kind: str
    group: str
    place: str
    purpose: Purpose
    calls: int
    elements: Fraction
    bytes: Fraction


class _Frame(NamedTuple):
    place: str
    task: int  # the backward pass in which the module was entered, -1 outside of one


class Ledger(TorchDispatchMode):
    """Counts the collectives issued while it is open; opened again later, it goes on counting.

    It changes no result.

    ``groups`` names process groups; another one is called by its ranks, "ranks 0,2". ValueError if two labels
    name one group.

    place     the module of :func:`inside`, else the innermost module of ``model`` in whose forward, or in the
              backward of whose forward, the collective was issued; the parameter's name in a hook on a leaf;
              "" elsewhere: in the model's own forward, outside of it, and in the backward of what ran before
              the ledger was opened
    purpose   "forward": in a module's forward; "backward": in an autograd node of a backward pass, or in a
              forward recomputed there; "gradient": under :func:`purpose`; "other": outside of all these, and
              in hooks on leaves and at the end of a backward pass

    A collective that it cannot count raises NotImplementedError. Nodes are told by their sequence number,
    which is a thread's own: in a reentrant checkpoint places are right where backward runs on the calling
    thread (on CPUs).
    """

    def __init__(self, model: nn.Module, groups: Mapping[str, dist.ProcessGroup]):
        super().__init__()
        self._modules = dict(model.named_modules())
        self._names = {id(module): name for name, module in self._modules.items()}
        self._parameters = {id(parameter): name for name, parameter in model.named_parameters()}
        self._labels = {group.group_name: label for label, group in groups.items()}
        if len(self._labels) < len(groups):
            raise ValueError(
                f"the labels {', '.join(groups)} name {len(self._labels)} groups, some of them twice"
            )
        self._sums: dict[tuple[str, str, str, Purpose], tuple[int, Fraction, Fraction]] = {}
        self._hooks: list[Any] = []
        self._stack: list[_Frame] = []
        self._starts: list[int] = []  # from this autograd sequence number on, nodes are made in ...
        self._places: list[str] = []  # ... this place
        self._thread = 0

    @property
    def entries(self) -> list[LedgerEntry]:
        """All rows, in the order in which they first occurred."""
        return [LedgerEntry(*key, *sums) for key, sums in self._sums.items()]

    def select(
        self,
        *,
        kind: str | None = None,
        group: str | None = None,
        place: str | None = None,
        purpose: Purpose | None = None,
    ) -> list[LedgerEntry]:
        """The rows that match all that is given.

        A place stands for all below it, but "" only for what has no place.
        """

        def matches(entry: LedgerEntry) -> bool:
            own = (entry.kind, entry.group, entry.purpose)
            if any(
                want is not None and want != have
                for want, have in zip((kind, group, purpose), own, strict=True)
            ):
                return False
            return place in (None, entry.place) or bool(place and entry.place.startswith(f"{place}."))

        return [entry for entry in self.entries if matches(entry)]

    def elements(self, **match: Any) -> Fraction:
        """Elements received in the rows that :meth:`select` finds, by the same arguments."""
        return sum((entry.elements for entry in self.select(**match)), Fraction())

    def __enter__(self) -> Ledger:
        if self._hooks:
            raise RuntimeError("the ledger is open already")
        self._thread = threading.get_ident()
        # outermost of the module's hooks: theirs may communicate too (ZeRO 3)
        for name, module in self._modules.items():
            self._hooks.append(
                module.register_forward_pre_hook(functools.partial(self._enter, name), prepend=True)
            )
            self._hooks.append(module.register_forward_hook(self._leave, always_call=True))
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._stack.clear()
        self._mark()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Enter the operator if it is a collective, then run it."""
        collective = _collective(func)
        if collective:
            self._record(collective, dict(zip(collective.arguments, args, strict=False)) | (kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _record(self, collective: _Collective, values: dict[str, Any]) -> None:
        group = _group(values)
        tensors = _tensors(values[collective.arguments[0]])
        counts = collective.rule(tensors, values, group.size(), group.rank())
        label = (
            self._labels.get(group.group_name)
            or f"ranks {','.join(map(str, dist.get_process_group_ranks(group)))}"
        )
        place, running = self._where()
        marked = _PLACE.get()
        key = (collective.kind, label, self._names.get(id(marked), place), _MARK.get() or running)
        calls, elements, size = self._sums.get(key, (0, Fraction(), Fraction()))
        in_bytes = (count * x.element_size() for count, x in zip(counts, tensors, strict=True))
        self._sums[key] = (calls + 1, elements + sum(counts), size + sum(in_bytes))

    def _where(self) -> tuple[str, Purpose]:
        """Place, and purpose as far as what is running shows it."""
        task = torch._C._current_graph_task_id()
        if self._stack and self._stack[-1].task == task:  # else these modules stand around the backward pass
            return self._stack[-1].place, "forward" if task == -1 else "backward"
        node = torch._C._current_autograd_node()
        if node is None:
            return "", "other"
        if isinstance(node, _functions.AccumulateGrad):
            return self._parameters.get(id(node.variable), ""), "other"
        index = bisect_right(self._starts, node._sequence_nr()) - 1
        return self._places[index] if index >= 0 else "", "backward"

    def _enter(self, place: str, *_: Any) -> None:
        self._stack.append(_Frame(place, torch._C._current_graph_task_id()))
        self._mark()

    def _leave(self, *_: Any) -> None:
        self._stack.pop()
        self._mark()

    def _mark(self) -> None:
        """Autograd nodes made from now on belong to the innermost open module."""
        if threading.get_ident() == self._thread:
            self._starts.append(_autograd._get_sequence_nr())
            self._places.append(self._stack[-1].place if self._stack else "")
