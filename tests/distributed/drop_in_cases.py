"""Structured linears in models that megatron-core builds by itself; called inside the ranks of a pool."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from sffn_dist.parallel import host
from sffn_dist.parallel.layer_spec import NormLayer, structured_layer_spec, structured_mlp_submodules
from sffn_dist.parallel.linears import StructuredLinear
from sffn_dist.parallel.split import part_view, shard
from sffn_dist.shapes import TensorSpec

VOCAB, LENGTH = 32, 8


def _groups(tensor: int) -> None:
    host.prepare()
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor, create_gloo_process_groups=False)


def _config(tensor: int = 1, **extra: Any) -> TransformerConfig:
    options: dict[str, Any] = {
        "num_layers": 2, "hidden_size": 24, "num_attention_heads": 4, "ffn_hidden_size": 48, "hidden_dropout": 0.0,
        "attention_dropout": 0.0, "tensor_model_parallel_size": tensor, "sequence_parallel": tensor > 1,
        "use_cpu_initialization": True, "init_method_std": 0.2, "masked_softmax_fusion": False, "bias_dropout_fusion": False,
        "gradient_accumulation_fusion": False, "bias_activation_fusion": False, "apply_rope_fusion": False,
    }  # fmt: skip
    return TransformerConfig(**{**options, **extra})


def _gpt(config: TransformerConfig, structure: dict[str, Any]) -> GPTModel:
    layers = [structured_layer_spec(**structure)] * config.num_layers
    return GPTModel(config, TransformerBlockSubmodules(layers, layer_norm=NormLayer), VOCAB, LENGTH)


# --------------------------------------------------------------------------------------------------- weights known by name


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
            p, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
            dim = parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None
            shape = [size * (p if axis == dim else 1) for axis, size in enumerate(parameter.shape)]
            full = _full(name, tuple(shape), parameter.dtype)
            found[name] = parameter, full if dim is None else full.chunk(p, dim)[rank], None
    return found


@torch.no_grad()
def _set_weights(module: nn.Module) -> None:
    for parameter, value, _ in _owned(module).values():
        parameter.copy_(value)


# ------------------------------------------------------------------------------------------------------------------- cases


def losses(tensor: int, structure: dict[str, Any], steps: int) -> list[float]:
    """Losses of a few AdamW steps as somebody's own loop over megatron-core's parts takes them."""
    _groups(tensor)
    config = _config(tensor)
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


def save(tensor: int, structure: dict[str, Any], gated: bool, folder: str, **metadata: Any) -> None:
    """A checkpoint of the weights that the names stand for."""
    _groups(tensor)
    model = _gpt(_config(tensor, gated_linear_unit=gated, activation_func=F.silu if gated else F.gelu), structure)
    _set_weights(model)
    dist_checkpointing.save(model.sharded_state_dict(metadata=metadata or None), folder)


def wrong_after_load(tensor: int, structure: dict[str, Any], gated: bool, folder: str, **metadata: Any) -> list[str]:
    """Names of the parameters that a loaded checkpoint does not give back bit for bit."""
    _groups(tensor)
    model = _gpt(_config(tensor, gated_linear_unit=gated, activation_func=F.silu if gated else F.gelu), structure)
    model.load_state_dict(dist_checkpointing.load(model.sharded_state_dict(metadata=metadata or None), folder))
    return [name for name, (parameter, value, _) in _owned(model).items() if not torch.equal(parameter.detach(), value)]


def first_weights(tensor: int, structure: dict[str, Any], seed: int) -> dict[str, Any]:
    """Every structured parameter as megatron-core's own construction leaves it; the ranks' generators disagree."""
    _groups(tensor)
    torch.manual_seed(seed + dist.get_rank())
    model = _gpt(_config(tensor), structure)
    return {name: parameter.detach().numpy() for name, (parameter, _, spec) in _owned(model).items() if spec is not None}


def _moe_groups(layout: str) -> tuple[ProcessGroupCollection, dict[str, Any]]:
    """Megatron's groups for experts spread over the ranks ("experts"), each split over them ("tensor"), or all on one rank ("one").

    They are made of those that the pool has: the ranks' one tensor- or data-parallel group, and groups of one rank.
    """
    together, alone = parallel_state.get_tensor_model_parallel_group(), parallel_state.get_data_parallel_group()
    if layout == "experts":
        together, alone = alone, together
    names = {"tp", "tp_ep", "tp_cp", "tp_dp_cp", "ep", "expt_tp", "expt_dp", "cp"}
    wide = {"experts": {"ep", "tp_ep", "tp_dp_cp"}, "tensor": {"tp", "expt_tp", "tp_ep", "tp_cp", "tp_dp_cp"}, "one": set()}[
        layout
    ]
    collection = ProcessGroupCollection()
    for name in names:
        setattr(collection, name, together if name in wide else alone)
    size = together.size()
    return collection, {
        "experts": {"expert_model_parallel_size": size, "expert_tensor_parallel_size": 1},
        "tensor": {"tensor": size, "expert_tensor_parallel_size": size},
        "one": {},
    }[layout]


def mixture(layout: str, structure: dict[str, Any], gated: bool, ranks: int) -> dict[str, Any]:
    """Output and gradients of megatron-core's MoELayer over two structured experts; of all tokens, of each expert by its number.

    ``ranks`` is how many ranks the tokens lie on in the layouts compared; layout "one" takes them all.
    """
    tensor = layout == "tensor"
    _groups(ranks if tensor else 1)
    collection, sizes = _moe_groups(layout)
    config = _config(
        **sizes, num_moe_experts=2, moe_router_topk=2, moe_router_load_balancing_type="none", moe_token_dispatcher_type="allgather",
        add_bias_linear=False, moe_ffn_hidden_size=48, gated_linear_unit=gated, activation_func=F.silu if gated else F.gelu,
        params_dtype=torch.float64, moe_router_dtype="fp64",
    )  # fmt: skip
    experts = ModuleSpec(module=SequentialMLP, submodules=structured_mlp_submodules(**structure))
    layer = MoELayer(config, MoESubmodules(experts=experts), layer_number=1, pg_collection=collection)
    rank = 0 if layout == "one" else dist.get_rank()
    named: dict[str, tuple[nn.Parameter, TensorSpec, int, int]] = {}
    with torch.no_grad():
        layer.router.weight.copy_(_full("router", tuple(layer.router.weight.shape), torch.float64))
        for number, expert in zip(layer.local_expert_indices, layer.experts.local_experts, strict=True):
            for name in ("linear_fc1", "linear_fc2"):
                linear = getattr(expert, name)
                for leaf, spec in linear.specs.items():
                    key, parameter = f"{number}.{name}.{leaf}", getattr(linear, leaf)
                    parameter.copy_(shard(_full(key, spec.shape, torch.float64), spec, linear.ranks, linear.rank))
                    named[key] = parameter, spec, linear.ranks, linear.rank
    x_all, weight = (_full(name, (4 * ranks, 3, config.hidden_size), torch.float64) for name in ("x", "output"))
    mine = slice(None) if layout == "one" else slice(4 * rank, 4 * rank + 4)
    x = x_all[mine].clone().requires_grad_()
    y, bias = layer(x)
    assert bias is None
    (y * weight[mine]).sum().backward()
    gradients = {}
    for key, (parameter, spec, p, own) in named.items():
        held = torch.zeros(spec.shape, dtype=torch.float64)
        part_view(held, spec, p, own).copy_(parameter.grad.reshape(part_view(held, spec, p, own).shape))
        gradients[key] = held.numpy(), spec.cut is None
    return {"y": y.detach().numpy(), "x": x.grad.numpy(), "gradients": gradients}
