"""What a rank asks of its device, counted: kernels launched, collectives, waits of the host.

A mode above FakeTensorMode sees every operator below autograd. Kernels of an operator are what ATen's CUDA
sources launch for it; where that depends on sizes, what they launch for large ones.
"""

from __future__ import annotations

import math
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from fake_cuda import device
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from sffn_dist.parallel import ledger

HERE = str(Path(__file__).parent)
# operators that launch none, by name: memory, metadata
_NONE = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh", "set_"),
    *("_unsafe_view", "resize_", "record_stream", "is_pinned", "detach", "alias", "view", "_reshape_alias"),
}
_SEVERAL = {
    "native_layer_norm_backward": 2,  # input; weight and bias
    "_fused_rms_norm_backward": 2,
    "_scaled_dot_product_flash_attention_backward": 3,  # row sums, gradients, fp32 -> bf16 of q's
    "embedding_dense_backward": 6,  # sort, offsets, sums
    "index_put": 8,  # with accumulate: sort, offsets, sums
    "index_put_": 8,
}
# multi_tensor_apply (ATen/native/cuda/MultiTensorApply.cuh): of one launch, tensors by number of lists;
# blocks of one launch; elements of a block
_TENSORS, _BLOCKS, _CHUNK = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}, 320, 65536


def multi_tensor_launches(sizes: list[int], lists: int) -> int:
    """Launches of one _foreach_ or _fused_ operator over tensors of these sizes, ``lists`` of them."""
    launches = tensors = blocks = 0
    for index, size in enumerate(sizes):
        tensors += 1
        chunks = math.ceil(size / _CHUNK)
        for chunk in range(chunks):
            blocks += 1
            last = chunk == chunks - 1
            if (tensors == _TENSORS[lists] and last) or blocks == _BLOCKS:
                launches, blocks, tensors = launches + 1, 0, 0 if last else 1
        if index == len(sizes) - 1 and blocks:
            launches += 1
    return launches


def kernels(func: Any, args: Any) -> int:
    """Kernels (and copies) that an operator launches."""
    schema = func._schema
    name = schema.name.partition("::")[2]
    if func.namespace != "aten" or name in _NONE or (func.is_view and not schema.is_mutable):
        return 0
    if name in ("index_put", "index_put_") and _fills_by_mask(args):
        return 1
    if name.startswith(("_foreach_", "_fused_adam")):
        lists = [value for value in args if isinstance(value, (list, tuple)) and value]
        lists = [value for value in lists if isinstance(value[0], Tensor) and value[0].numel() >= 1]
        depth = min(len(lists) + (not name.endswith("_") and name != "_foreach_norm"), 4)
        return multi_tensor_launches([x.numel() for x in lists[0]], depth) + (name == "_foreach_norm")
    if name == "cat":
        return math.ceil(len(args[0]) / 128)
    return _SEVERAL.get(name, 1)


def _masks(args: Any) -> bool:
    return any(index is not None and index.dtype == torch.bool for index in args[1])


def _fills_by_mask(args: Any) -> bool:
    """x[mask] = number: one masked_fill; other assignments by mask ask how many entries it has."""
    return _masks(args) and args[2].numel() == 1


def caller() -> str:
    """file:function of the innermost frame of a library or of sffn_dist, torch and accelerators left out."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        for package in ("deepspeed/", "megatron/", "sffn_dist/", "sffn_kernels/"):
            if f"/{package}" in file and "/accelerator/" not in file and not file.startswith(HERE):
                return f"{package}{file.rpartition(package)[2]}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "?"


@dataclass
class Counts:
    """Of one part of a step."""

    kernels: int = 0
    operators: Counter[str] = field(default_factory=Counter)  # kernels of each
    collectives: dict[str, list[int]] = field(default_factory=lambda: defaultdict(lambda: [0, 0]))
    synchronize: Counter[str] = field(default_factory=Counter)  # of a device, stream or event, by caller
    host_syncs: Counter[str] = field(default_factory=Counter)  # values read, pageable copies, by caller

    def row(self) -> dict[str, Any]:
        """As JSON: a collective's key is "kind group", its value calls and bytes received."""
        return {
            "kernels": self.kernels,
            "operators": dict(self.operators.most_common()),
            "collectives": {key: list(value) for key, value in sorted(self.collectives.items())},
            "synchronize": dict(self.synchronize),
            "host_syncs": dict(self.host_syncs),
        }


class Counting(TorchDispatchMode):
    """Counts into ``self.counts``, and answers what fake tensors cannot."""

    def __init__(self, groups: dict[str, Any]):
        super().__init__()
        self.counts = Counts()
        self._labels = {group.group_name: label for label, group in groups.items()}
        device.on_synchronize(lambda kind: self.counts.synchronize.update([f"{kind} {caller()}"]))
        FakeTensor.tolist = lambda x: self._listed(x)  # type: ignore[method-assign]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        collective = ledger._collective(func)
        if collective:
            return self._collective(collective, func, args, kwargs)
        if func is torch.ops.aten._local_scalar_dense.default:
            return self._scalar(args[0])
        out = func(*args, **kwargs)
        tensors = [x for x in (*args, out) if isinstance(x, Tensor)]
        lists = [x for part in args if isinstance(part, (list, tuple)) for x in part if isinstance(x, Tensor)]
        if any(x.is_cuda for x in (*tensors, *lists)):
            launched = kernels(func, args)
            self.counts.kernels += launched
            if launched:
                self.counts.operators[func._schema.name.partition("::")[2]] += launched
            self._copies(func, args, kwargs, out)
        return out

    def _collective(self, collective: Any, func: Any, args: Any, kwargs: Any) -> Any:
        values = dict(zip(collective.arguments, args, strict=False)) | kwargs
        group = ledger._group(values)
        tensors = ledger._tensors(values[collective.arguments[0]])
        received = collective.rule(tensors, values, group.size(), group.rank())
        if group.size() > 1 or collective.kind == "barrier":
            label = self._labels.get(group.group_name, group.group_name)
            entry = self.counts.collectives[f"{collective.kind} {label}"]
            entry[0] += 1
            entry[1] += int(sum(n * x.element_size() for n, x in zip(received, tensors, strict=True)))
        if "coalesced" in func._schema.name:  # torch's fake tensors do not know these; the others do nothing
            return FakeWork().boxed()
        return func(*args, **kwargs)

    def _listed(self, x: Tensor) -> list[Any]:
        """tolist() of one dimension: one copy to the host."""
        self.counts.host_syncs[caller()] += x.is_cuda
        return [1.0 if x.dtype.is_floating_point else 1] * x.numel()

    def _scalar(self, x: Tensor) -> Any:
        where = caller()
        if x.is_cuda:
            self.counts.host_syncs[where] += 1
        elif getattr(x, "constant", None) is not None:
            return x.constant.item()  # type: ignore[attr-defined]
        elif type(x) is Tensor:
            return torch.ops.aten._local_scalar_dense.default(x)
        if x.dtype == torch.bool:
            return False
        # an overflow would skip the step; else anything above 0, as Adam's step count must be
        value = 0 if any(word in where for word in ("overflow", "inf_or_nan")) else 1
        return float(value) if x.dtype.is_floating_point else value

    def _copies(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        name = func._schema.name
        by_mask = (name == "aten::index" and _masks(args)) or (
            name in ("aten::index_put", "aten::index_put_") and _masks(args) and not _fills_by_mask(args)
        )
        if by_mask or name in ("aten::nonzero", "aten::equal", "aten::is_nonzero", "aten::masked_select"):
            self.counts.host_syncs[caller()] += 1
        if name == "aten::_to_copy":
            source, target, free = args[0], out, kwargs.get("non_blocking", False)
        elif name == "aten::copy_":
            source, target, free = args[1], args[0], len(args) > 2 and args[2]
        else:
            return
        if source.device.type == target.device.type or "meta" in (source.device.type, target.device.type):
            return
        host = target if source.is_cuda else source
        if not (free and getattr(host, "pretended_pinned", False)):
            self.counts.host_syncs[caller()] += 1
