"""Structured linears in models that megatron-core builds by itself; called inside the ranks of a pool."""

from __future__ import annotations

import copy
import hashlib
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.optimizer import (
    get_param_id_to_sharded_param_map,
    optim_state_to_sharding_state,
)
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from sffn_dist.parallel import cpu_compat
from sffn_dist.parallel.layer_spec import NormLayer, structured_layer_spec, structured_mlp_submodules
from sffn_dist.parallel.linears import StructuredLinear
from sffn_dist.parallel.split import part_view, shard
from sffn_dist.structured.cut import TensorSpec

VOCAB, LENGTH = 32, 8
Named = dict[
    str, tuple[nn.Parameter, Tensor, TensorSpec, StructuredLinear]
]  # parameter, its value, its spec, its linear


def _groups(tensor: int) -> None:
    cpu_compat.prepare()
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tensor, create_gloo_process_groups=False
        )


def _config(tensor: int = 1, **extra: Any) -> TransformerConfig:
    options: dict[str, Any] = {
        "num_layers": 2, "hidden_size": 24, "num_attention_heads": 4, "ffn_hidden_size": 48,
        "hidden_dropout": 0.0, "attention_dropout": 0.0, "tensor_model_parallel_size": tensor,
        "sequence_parallel": tensor > 1, "use_cpu_initialization": True, "init_method_std": 0.2,
        "masked_softmax_fusion": False, "bias_dropout_fusion": False, "gradient_accumulation_fusion": False,
        "bias_activation_fusion": False, "apply_rope_fusion": False,
    }  # fmt: skip
    return TransformerConfig(**{**options, **extra})


def _gpt(config: TransformerConfig, structure: dict[str, Any]) -> GPTModel:
    layers = [structured_layer_spec(**structure)] * config.num_layers
    return GPTModel(config, TransformerBlockSubmodules(layers, layer_norm=NormLayer), VOCAB, LENGTH)


# -------------------------------------------------------------------------------------- weights known by name


def _full(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The full tensor that every test means by this name."""
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "little")
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return (1 + drawn / 8) if "norm.weight" in name else drawn / 5


def _owned(module: nn.Module) -> dict[str, tuple[nn.Parameter, Tensor, TensorSpec | None]]:
    """name -> parameter, this rank's part of the full tensor, the spec of a structured linear's."""
    found: dict[str, tuple[nn.Parameter, Tensor, TensorSpec | None]] = {}
    for prefix, part in module.named_modules():
        for leaf, parameter in part.named_parameters(recurse=False):
            name = f"{prefix}.{leaf}"
            if isinstance(part, StructuredLinear):
                spec = part.specs[leaf]
                full = _full(name, spec.shape, parameter.dtype)
                found[name] = parameter, shard(full, spec, part.ranks, part.rank), spec
                continue
            p, rank = (
                parallel_state.get_tensor_model_parallel_world_size(),
                parallel_state.get_tensor_model_parallel_rank(),
            )
            dim = parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None
            shape = [size * (p if axis == dim else 1) for axis, size in enumerate(parameter.shape)]
            full = _full(name, tuple(shape), parameter.dtype)
            found[name] = parameter, full if dim is None else full.chunk(p, dim)[rank], None
    return found


@torch.no_grad()
def _set_weights(module: nn.Module) -> None:
    for parameter, value, _ in _owned(module).values():
        parameter.copy_(value)


# ------------------------------------------------------------------------------------------------------ cases


def losses(tensor: int, structure: dict[str, Any], steps: int, sequence: bool = True) -> list[float]:
    """Losses of a few AdamW steps as somebody's own loop over megatron-core's parts takes them."""
    _groups(tensor)
    config = _config(tensor, sequence_parallel=sequence and tensor > 1)
    model = _gpt(config, structure)
    _set_weights(model)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    wrapped = DistributedDataParallel(config, DistributedDataParallelConfig(), model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    tokens = torch.randint(0, VOCAB, (3, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(LENGTH).expand(3, LENGTH)
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)[None, None]  # True where a token may not look
    found = []
    for _ in range(steps):
        wrapped.zero_grad_buffer()
        loss = wrapped(tokens[:, :-1], positions, mask, labels=tokens[:, 1:]).mean()
        loss.backward()
        finalize_model_grads([wrapped])
        for parameter in model.parameters():
            parameter.grad = parameter.main_grad
        optimizer.step()
        found.append(float(loss))
    assert not any(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    return found


def loss_of_gathered_weights(structure: dict[str, Any], overlap: bool) -> float:
    """Loss over two data-parallel ranks that each hold the right half of the weights, as the distributed
    optimizer leaves them.

    With ``overlap`` Megatron gathers the other half while the forward pass runs, a module's just before the
    module is called.
    """
    _groups(1)
    config = _config()
    model = _gpt(config, structure)
    _set_weights(model)
    options = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        overlap_param_gather=overlap,
        overlap_grad_reduce=overlap,
        bucket_size=1500,
    )
    wrapped = DistributedDataParallel(config, options, model)
    for buffer in wrapped.buffers:
        for bucket in buffer.buckets:
            for rank, part in enumerate(bucket.param_data.chunk(dist.get_world_size())):
                if rank != dist.get_rank():
                    part.zero_()
    if not overlap:
        wrapped.start_param_sync(force_sync=True)
    tokens = torch.randint(0, VOCAB, (3, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(LENGTH).expand(3, LENGTH)
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)[None, None]
    return float(wrapped(tokens[:, :-1], positions, mask, labels=tokens[:, 1:]).mean())


def _with_moments(model: GPTModel, **metadata: Any) -> tuple[dict[str, Any], torch.optim.Optimizer]:
    """What a user saves and loads: the weights, and the optimizer's moment of each, here twice the weight."""
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    for parameter in model.parameters():
        optimizer.state[parameter] = {"momentum_buffer": 2 * parameter.detach()}
    weights, state = model.sharded_state_dict(metadata=metadata or None), optimizer.state_dict()
    of_parameter = get_param_id_to_sharded_param_map(weights, model.parameters())
    optim_state_to_sharding_state(state, of_parameter)
    return {"model": weights, "optimizer": state}, optimizer


def save(tensor: int, structure: dict[str, Any], gated: bool, folder: str, **metadata: Any) -> None:
    """A checkpoint of the weights that the names stand for."""
    _groups(tensor)
    model = _gpt(
        _config(tensor, gated_linear_unit=gated, activation_func=F.silu if gated else F.gelu), structure
    )
    _set_weights(model)
    dist_checkpointing.save(_with_moments(model, **metadata)[0], folder)


def wrong_after_load(
    tensor: int, structure: dict[str, Any], gated: bool, folder: str, **metadata: Any
) -> list[str]:
    """Names of the parameters that a loaded checkpoint does not give back bit for bit, or not their
    moments.
    """
    _groups(tensor)
    model = _gpt(
        _config(tensor, gated_linear_unit=gated, activation_func=F.silu if gated else F.gelu), structure
    )
    template, optimizer = _with_moments(model, **metadata)
    loaded = dist_checkpointing.load(template, folder)
    model.load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])
    owned = _owned(model).items()
    wrong = [name for name, (parameter, value, _) in owned if not torch.equal(parameter.detach(), value)]
    moments = {name: optimizer.state[parameter]["momentum_buffer"] for name, (parameter, _, _) in owned}
    return wrong + [
        f"{name}: moment" for name, (_, value, _) in owned if not torch.equal(moments[name], 2 * value)
    ]


def first_weights(
    tensor: int, structure: dict[str, Any], seed: int, std: float = 0.2
) -> dict[str, tuple[Any, bool]]:
    """Every structured parameter as its construction leaves it, and whether it is replicated; the ranks'
    random states disagree.
    """
    _groups(tensor)
    torch.manual_seed(seed + dist.get_rank())
    model = _gpt(_config(tensor, init_method_std=std), structure)
    owned = _owned(model).items()
    return {
        name: (parameter.detach().numpy(), spec.cut is None)
        for name, (parameter, _, spec) in owned
        if spec is not None
    }


def _moe_groups(layout: str) -> tuple[ProcessGroupCollection, dict[str, Any]]:
    """Megatron's groups for experts spread over the ranks ("experts"), each split over them ("tensor"), or
    all on one rank ("one").

    They are made of those that the pool has: the ranks' one tensor- or data-parallel group, and groups of one
    rank.
    """
    together, alone = (
        parallel_state.get_tensor_model_parallel_group(),
        parallel_state.get_data_parallel_group(),
    )
    if layout == "experts":
        together, alone = alone, together
    names = {"tp", "tp_ep", "tp_cp", "tp_dp_cp", "ep", "expt_tp", "expt_dp", "cp"}
    wide = {
        "experts": {"ep", "tp_ep", "tp_dp_cp"},
        "tensor": {"tp", "expt_tp", "tp_ep", "tp_cp", "tp_dp_cp"},
        "one": set(),
    }[layout]
    collection = ProcessGroupCollection()
    for name in names:
        setattr(collection, name, together if name in wide else alone)
    size = together.size()
    return collection, {
        "experts": {"expert_model_parallel_size": size, "expert_tensor_parallel_size": 1},
        "tensor": {"tensor": size, "expert_tensor_parallel_size": size},
        "one": {},
    }[layout]


def _mixture(
    layout: str, structure: dict[str, Any], gated: bool, ranks: int, bias: bool = False
) -> tuple[MoELayer, Named]:
    """megatron-core's MoELayer over two structured experts, and every expert's parameters by the expert's
    number.
    """
    _groups(ranks if layout == "tensor" else 1)
    collection, sizes = _moe_groups(layout)
    config = _config(
        **sizes, num_moe_experts=2, moe_router_topk=2, moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="allgather", add_bias_linear=bias, moe_ffn_hidden_size=48,
        gated_linear_unit=gated, activation_func=F.silu if gated else F.gelu, params_dtype=torch.float64,
        moe_router_dtype="fp64",
    )  # fmt: skip
    experts = ModuleSpec(module=SequentialMLP, submodules=structured_mlp_submodules(**structure))
    layer = MoELayer(config, MoESubmodules(experts=experts), layer_number=1, pg_collection=collection)
    named: Named = {}
    for number, expert in zip(layer.local_expert_indices, layer.experts.local_experts, strict=True):
        for name in ("linear_fc1", "linear_fc2"):
            linear = getattr(expert, name)
            for leaf, spec in linear.specs.items():
                full = _full(f"{number}.{name}.{leaf}", spec.shape, torch.float64)
                value = shard(full, spec, linear.ranks, linear.rank)
                named[f"{number}.{name}.{leaf}"] = getattr(linear, leaf), value, spec, linear
    return layer, named


@torch.no_grad()
def _set_mixture(layer: MoELayer, named: Named) -> None:
    for name, parameter in layer.router.named_parameters():
        parameter.copy_(_full(f"router.{name}", tuple(parameter.shape), torch.float64))
    for parameter, value, _, _ in named.values():
        parameter.copy_(value)


def mixture(layout: str, structure: dict[str, Any], gated: bool, bias: bool, ranks: int) -> dict[str, Any]:
    """Output and gradients for this rank's tokens; gradients of its experts, in place in the full tensor, and
    if they are replicated.

    ``ranks`` is how many ranks the tokens lie on in the layouts compared; layout "one" takes them all.
    """
    vars(moe_utils).setdefault(
        "te_general_gemm", None
    )  # megatron-core 0.16.1 leaves it undefined without Transformer Engine
    layer, named = _mixture(layout, structure, gated, ranks, bias)
    _set_mixture(layer, named)
    x_all, weight = (
        _full(name, (4 * ranks, 3, layer.config.hidden_size), torch.float64) for name in ("x", "output")
    )
    mine = slice(None) if layout == "one" else slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4)
    x = x_all[mine].clone().requires_grad_()
    y, left_bias = layer(x)
    assert left_bias is None
    (y * weight[mine]).sum().backward()
    gradients = {}
    for key, (parameter, _, spec, linear) in named.items():
        held = torch.zeros(spec.shape, dtype=torch.float64)
        part = part_view(held, spec, linear.ranks, linear.rank)
        part.copy_(parameter.grad.reshape(part.shape))
        gradients[key] = held.numpy(), spec.cut is None
    return {"y": y.detach().numpy(), "x": x.grad.numpy(), "gradients": gradients}


def save_mixture(layout: str, structure: dict[str, Any], bias: bool, ranks: int, folder: str) -> None:
    """A checkpoint of gated experts."""
    layer, named = _mixture(layout, structure, True, ranks, bias)
    _set_mixture(layer, named)
    dist_checkpointing.save(layer.sharded_state_dict(prefix="moe."), folder)


def wrong_in_mixture(
    layout: str, structure: dict[str, Any], bias: bool, ranks: int, folder: str
) -> list[str]:
    """Names of the experts' parameters that a loaded checkpoint does not give back bit for bit."""
    layer, named = _mixture(layout, structure, True, ranks, bias)
    loaded = dist_checkpointing.load(layer.sharded_state_dict(prefix="moe."), folder)
    layer.load_state_dict({name.removeprefix("moe."): value for name, value in loaded.items()})
    return [
        name for name, (parameter, value, _, _) in named.items() if not torch.equal(parameter.detach(), value)
    ]


def refusal(**arguments: Any) -> str:
    """What ``structured_layer_spec`` says to these arguments; base "experts" is a layer of experts."""
    if "base" in arguments:
        arguments["base"] = get_gpt_layer_local_spec(num_experts=2)
    try:
        structured_layer_spec(**arguments)
    except ValueError as error:
        return str(error)
    return ""


def check_base_is_kept() -> None:
    """A base with a norm inside its attention, and with the one before the feed-forward layer fused into a
    linear.
    """
    base = get_gpt_layer_local_spec(qk_layernorm=True)
    base.submodules.pre_mlp_layernorm = IdentityOp  # Transformer Engine's specs
    before = copy.deepcopy(base)
    spec = structured_layer_spec("low_rank", rank=4, base=base)
    spec.submodules.mlp.params["own"] = spec.submodules.self_attention.params["own"] = True
    assert base == before
    assert spec.submodules.self_attention.submodules == base.submodules.self_attention.submodules
    assert spec.submodules.pre_mlp_layernorm is NormLayer, (
        "the norm would have gone with the linear that held it"
    )
    assert spec.submodules.mlp.submodules.linear_fc1.params["structure"].rank == 4
