"""A feed-forward layer of structured linears on p ranks against plain one-device mathematics, in float64."""

from __future__ import annotations

import functools
import weakref
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sffn_dist.parallel import cpu_compat, topology
from sffn_dist.parallel.collectives import sum_partial_gradients
from sffn_dist.parallel.feed_forward import StructuredMLP
from sffn_dist.parallel.layer_spec import structured_mlp_submodules
from sffn_dist.parallel.ledger import Ledger
from sffn_dist.parallel.split import shard, unshard
from sffn_dist.spec.split_table import linear_tensors
from sffn_dist.structured import functional
from sffn_dist.structured.registry import build_structure
from sffn_dist.structured.structure import Structure


def _full_tensors(
    structure: Structure, h: int, f: int, gated: bool, bias: bool, guide: bool
) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    sizes = {"column": (h, 2 * f if gated else f), "row": (f, h)}
    full: dict[str, dict[str, Tensor]] = {}
    for role, (inputs, outputs) in sizes.items():
        specs = linear_tensors(
            structure, role, inputs, outputs, gated=gated and role == "column", bias=bias, guide=guide
        )
        full[role] = {
            name: torch.randn(spec.shape, generator=generator, dtype=torch.float64) / spec.shape[-1] ** 0.5
            for name, spec in specs.items()
        }
    return full


def _activation(y: Tensor, gated: bool) -> Tensor:
    if not gated:
        return F.gelu(y, approximate="tanh")
    gate, up = y.chunk(2, dim=-1)
    return F.silu(gate) * up


def _reference(
    structure: Structure, full: dict[str, dict[str, Tensor]], x: Tensor, gated: bool, alpha: float | None
) -> Tensor:
    def linear(tensors: dict[str, Tensor], value: Tensor) -> Tensor:
        factors = {name: t for name, t in tensors.items() if name not in ("bias", "guide")}
        y = functional.apply(structure, value, factors)
        if alpha is not None:
            y = alpha * F.linear(value, tensors["guide"]) + (1 - alpha) * y
        return y + tensors["bias"] if "bias" in tensors else y

    return linear(full["row"], _activation(linear(full["column"], x), gated))


def _error(got: Tensor, want: Tensor) -> float:
    scale = want.square().mean().sqrt().item()
    return (got - want).square().mean().sqrt().item() / (scale or 1.0)


def _ours(
    structure: Structure,
    h: int,
    f: int,
    gated: bool,
    bias: bool,
    sequence: bool,
    alpha: float | None,
    recompute: str,
    p: int,
) -> MLP:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=h,
        ffn_hidden_size=f,
        num_attention_heads=p,
        kv_channels=4,
        gated_linear_unit=gated,
        activation_func=F.silu if gated else functools.partial(F.gelu, approximate="tanh"),
        add_bias_linear=bias,
        bias_activation_fusion=False,
        params_dtype=torch.float64,
        tensor_model_parallel_size=p,
        sequence_parallel=sequence,
        use_cpu_initialization=True,
        perform_initialization=False,
    )
    if structure.kind == "dense":
        return MLP(
            config,
            MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
            ffn_hidden_size=f,
        )
    sizes = {"rank": structure.rank, "blocks": structure.blocks}
    linears = structured_mlp_submodules(structure.kind, **sizes, guide=alpha is not None)
    return StructuredMLP(config, linears, ffn_hidden_size=f, recompute=recompute)


def feed_forward_errors(
    kind: str, rank: int | None, blocks: int | None, h: int, f: int, gated: bool, bias: bool, sequence: bool,
    alpha: float | None, rows: int, batch: int, recompute: str,
) -> dict[str, float]:  # fmt: skip
    """Relative RMS error of the output and of every gradient, on this rank, against the reference."""
    ranks = join()
    p, structure = ranks.tensor_parallel_size, build_structure(kind, rank, blocks)
    full = _full_tensors(structure, h, f, gated, bias, guide=alpha is not None)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(rows, batch, h, generator=generator, dtype=torch.float64)
    weight = torch.randn(rows, batch, h, generator=generator, dtype=torch.float64)

    for tensors in full.values():
        for tensor in tensors.values():
            tensor.requires_grad_()
    x_ref = x.clone().requires_grad_()
    y_ref = _reference(structure, full, x_ref, gated, alpha)
    (y_ref * weight).sum().backward()

    mlp = _ours(structure, h, f, gated, bias, sequence, alpha, recompute, p)
    layers = {"column": mlp.linear_fc1, "row": mlp.linear_fc2}
    for role, layer in layers.items():
        layer.guide_weight = alpha
        for name, tensor in full[role].items():
            getattr(layer, name).data.copy_(
                shard(tensor.detach(), layer.specs[name], p, ranks.tensor_parallel_rank)
            )
    sum_partial_gradients(mlp, ranks.tensor_group)
    mine = (
        slice(ranks.tensor_parallel_rank * rows // p, (ranks.tensor_parallel_rank + 1) * rows // p)
        if sequence
        else slice(None)
    )
    x_local = x[mine].clone().requires_grad_()
    y, left = mlp(x_local)
    y = y if left is None else y + left
    (y * weight[mine]).sum().backward()

    errors = {"y": _error(y.detach(), y_ref[mine].detach()), "x.grad": _error(x_local.grad, x_ref.grad[mine])}
    for role, layer in layers.items():
        for name, tensor in full[role].items():
            parts = [torch.empty_like(getattr(layer, name)) for _ in range(p)]
            torch.distributed.all_gather(parts, getattr(layer, name).grad.contiguous())
            spec = layer.specs[name]
            errors[f"{role}.{name}.grad"] = _error(unshard(parts, spec), tensor.grad)
            if spec.cut is None:  # replicas: bit-identical
                assert all(torch.equal(part, parts[0]) for part in parts), (
                    f"{role}.{name}: replicated gradients differ"
                )
    return errors


def traffic(
    kind: str, rank: int | None, blocks: int | None, h: int, f: int, gated: bool, sequence: bool,
    alpha: float | None, rows: int, batch: int, recompute: str,
) -> dict[tuple[str, str, str], Fraction]:  # fmt: skip
    """Elements that this rank receives in forward and backward of one layer, by (linear, purpose, kind);
    dense is Megatron's own.
    """
    ranks = join()
    p, structure = ranks.tensor_parallel_size, build_structure(kind, rank, blocks)
    mlp = _ours(structure, h, f, gated, False, sequence, alpha, recompute, p)
    for parameter in mlp.parameters():
        torch.nn.init.normal_(parameter)
    for linear in (mlp.linear_fc1, mlp.linear_fc2):
        linear.guide_weight = alpha
    x = torch.randn(rows // p if sequence else rows, batch, h, dtype=torch.float64, requires_grad=True)
    with Ledger(mlp, {"tensor": ranks.tensor_group}) as ledger:
        mlp(x)[0].sum().backward()
    found: dict[tuple[str, str, str], Fraction] = {}
    for entry in ledger.entries:
        assert entry.group == "tensor"
        assert entry.bytes == 8 * entry.elements
        found[entry.place, entry.purpose, entry.kind] = entry.elements
    return found


def saved_bytes(
    kind: str,
    rank: int | None,
    blocks: int | None,
    h: int,
    f: int,
    gated: bool,
    sequence: bool,
    recompute: str,
    rows: int,
) -> int:
    """Bytes that one layer keeps for backward on this rank: storages counted once, without parameters."""
    ranks = join()
    p, structure = ranks.tensor_parallel_size, build_structure(kind, rank, blocks)
    mlp = _ours(structure, h, f, gated, False, sequence, None, recompute, p)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in mlp.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = torch.randn(rows // p if sequence else rows, 1, h, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = mlp(x)[0]
    y.sum().backward()
    return sum(kept.values())


def frozen_guided(kind: str, rank: int | None, blocks: int | None, sequence: bool, recompute: str) -> float:
    """Largest difference of any gradient from that with nothing frozen, while the guide takes part and x or
    any one weight, or all but one, is frozen; the frozen ones have none.
    """
    ranks = join()
    mlp = _ours(
        build_structure(kind, rank, blocks),
        8,
        16,
        False,
        False,
        sequence,
        0.3,
        recompute,
        ranks.tensor_parallel_size,
    )
    torch.manual_seed(ranks.tensor_parallel_rank)
    for parameter in mlp.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    for linear in (mlp.linear_fc1, mlp.linear_fc2):
        linear.guide_weight = 0.3
    x = torch.randn(4, 2, 8, dtype=torch.float64)
    named = {"x": x, **dict(mlp.named_parameters())}

    def gradients(wanted: set[str]) -> dict[str, Tensor]:
        for name, tensor in named.items():
            tensor.requires_grad_(name in wanted)
            tensor.grad = None
        mlp(x)[0].square().sum().backward()
        return {name: tensor.grad.clone() for name, tensor in named.items() if tensor.grad is not None}

    whole = gradients(set(named))
    worst = 0.0
    for wanted in [set(named) - {name} for name in named] + [{name} for name in named]:
        found = gradients(wanted)
        assert found.keys() == wanted
        worst = max([worst, *(float((found[name] - whole[name]).abs().max()) for name in wanted)])
    return worst


def other_uses(
    kind: str, rank: int | None, blocks: int | None, sequence: bool, recompute: str
) -> dict[str, Any]:
    """A layer under autocast, with frozen weights, differentiated twice, by its second linear's guide that
    it has not.
    """
    ranks = join()
    p, structure, h, f = ranks.tensor_parallel_size, build_structure(kind, rank, blocks), 16, 64
    mlp = _ours(structure, h, f, True, True, sequence, None, recompute, p).float()
    for parameter in mlp.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    found: dict[str, Any] = {}
    x = torch.randn(8 // p if sequence else 8, 2, h, requires_grad=True)

    def gradients(layer: Any, value: Tensor) -> list[Tensor]:
        y = layer(value)[0]
        return [y, *torch.autograd.grad(y.float().sum(), [value, *layer.parameters()], allow_unused=True)][
            :-1
        ]

    exact = gradients(mlp, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = gradients(mlp, x)
    found["autocast"] = (
        low[0].dtype == torch.bfloat16,
        max(_error(a.float(), b) for a, b in zip(low, exact, strict=True)),
    )

    frozen = [mlp.linear_fc1.weights[0], mlp.linear_fc2.weights[1]]  # those that every rank holds
    for weight in frozen:
        weight.requires_grad_(False)
    rest = [
        weight for weight in mlp.parameters() if weight.requires_grad and weight is not mlp.linear_fc2.bias
    ]
    with Ledger(mlp, {"tensor": ranks.tensor_group}) as ledger:
        found_rest = torch.autograd.grad(mlp(x)[0].sum(), [x, *rest])
    same = dict(zip([id(x), *map(id, mlp.parameters())], exact[1:], strict=False))
    found["frozen"] = max(_error(a, same[id(b)]) for a, b in zip(found_rest, [x, *rest], strict=True))
    found["summed"] = float(ledger.elements(purpose="gradient"))
    for weight in mlp.parameters():
        weight.requires_grad_(weight is mlp.linear_fc2.weights[1])
    with Ledger(mlp, {"tensor": ranks.tensor_group}) as ledger:
        (last,) = torch.autograd.grad(mlp(x.detach())[0].sum(), mlp.linear_fc2.weights[1:2])
    found["last"] = _error(last, same[id(mlp.linear_fc2.weights[1])])
    found["last_backward"] = float(ledger.elements(purpose="backward"))
    for weight in mlp.parameters():
        weight.requires_grad_()

    (first,) = torch.autograd.grad(mlp(x)[0].square().sum(), [x], create_graph=True)
    try:
        first.square().sum().backward()
    except RuntimeError as error:
        found["twice"] = str(error)
    try:
        mlp.linear_fc2.guide_weight = 0.5
    except ValueError as error:
        found["guide"] = str(error)
    linear = mlp.linear_fc1
    states = [linear.split.exchange.tokens]
    for outside in (True, False):  # as a shared expert of Megatron's sets it once it is built
        linear.explicit_expert_comm = outside
        assert linear.explicit_expert_comm == outside
        states.append(linear.split.exchange.tokens)
    found["tokens"] = states
    return found


def join() -> topology.Topology:
    """This rank's place, all ranks of the pool being one tensor-parallel group."""
    cpu_compat.prepare()
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    return topology.groups(torch.distributed.get_world_size())


class LiveBytes(TorchDispatchMode):
    """The most bytes of storages made within that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is not None and storage._cdata not in given | self.known:
                self.known.add(storage._cdata)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return out

    def _gone(self, which: int, size: int) -> None:
        self.known.discard(which)
        self.live -= size


def peak_bytes(
    kind: str, rank: int | None, blocks: int | None, h: int, f: int, rows: int, recompute: str
) -> int:
    """The most that a layer's forward and backward pass holds beside its input, output gradient and
    weights.
    """
    ranks = join()
    mlp = _ours(
        build_structure(kind, rank, blocks),
        h,
        f,
        False,
        False,
        False,
        None,
        recompute,
        ranks.tensor_parallel_size,
    )
    for parameter in mlp.parameters():
        parameter.data.normal_()
    x = torch.randn(rows, 1, h, dtype=torch.float64, requires_grad=True)
    sent = torch.randn_like(x)
    with LiveBytes() as seen:
        mlp(x)[0].backward(sent)
    assert x.grad is not None
    return seen.peak


def any_leading_dimensions(kind: str, rank: int | None, blocks: int | None, recompute: str) -> float:
    """The largest error between an input as (T, h), (T, 1, h) and (a, b, c, h), with a gradient and
    without one; 40 and 80 tokens.
    """
    ranks = join()
    mlp = _ours(
        build_structure(kind, rank, blocks),
        16,
        64,
        True,
        True,
        False,
        None,
        recompute,
        ranks.tensor_parallel_size,
    )
    for parameter in mlp.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    errors = []
    for tokens in (40, 80):
        x = torch.randn(tokens, 16, dtype=torch.float64, requires_grad=True)
        shapes = [(tokens, 1, 16), (tokens, 16), (2, tokens // 4, 2, 16)]
        made = []
        for shape in shapes:
            y = mlp(x.view(shape))[0]
            assert y.shape == shape
            (gradient,) = torch.autograd.grad(y.square().sum(), x)
            with torch.no_grad():
                made.append((y.detach().view(tokens, 16), gradient, mlp(x.view(shape))[0].view(tokens, 16)))
        errors += [
            _error(got, want)
            for other in made
            for got, want in zip(other, (*made[0][:2], made[0][0]), strict=True)
        ]
    return max(errors)
