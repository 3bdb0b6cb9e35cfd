"""What of an engine is the run's state: fp32 weights, both Adam moments, Adam's step counts.

Each stage keeps them elsewhere.

A *master* is a flat fp32 tensor that AdamW steps: in ZeRO 1-3 this rank's range of a parameter group, in ZeRO
0 a whole parameter. The guide is the engine's last parameter group, so the masters of all others (the
*base parameters*) are the same tensors with or without it: a new engine takes them over from an old one as
they are, rank by rank, without a collective. :func:`fragments` names what of each parameter a master holds;
checkpoints read and write through it, so that any stage can load what another one saved.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sffn_dist.checkpoint.manifest import MOMENTS
from sffn_dist.checkpoint.writer import Fragment
from sffn_dist.parallel.split import unshard
from sffn_dist.parallel.topology import Topology
from sffn_dist.structured.cut import TensorSpec

Engine = Any  # deepspeed.DeepSpeedEngine, which is not typed
ExportedState = list[dict[str, Tensor]]  # of each base master: "weight", "exp_avg", "exp_avg_sq", "step"


def torch_optimizer(engine: Engine) -> torch.optim.Optimizer:
    """The one that training/optimizers/ made, under DeepSpeed's or by itself.

    It keeps exp_avg, exp_avg_sq and step.
    """
    optimizer = engine.optimizer
    inner = optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer.optimizer
    assert isinstance(inner, torch.optim.Optimizer)
    return inner


def master_params(engine: Engine) -> tuple[list[Tensor], list[Tensor]]:
    """Those of the base parameters, and those of the guide."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # stage 3 cuts a group into several
        flat = list(optimizer.fp32_partitioned_groups_flat)
        groups = [optimizer.sub_group_to_group_id[index] for index in range(len(flat))]
    else:
        flat = [p for group in optimizer.param_groups for p in group["params"]]
        groups = [index for index, group in enumerate(optimizer.param_groups) for _ in group["params"]]
    base_params = [master for master, group in zip(flat, groups, strict=True) if group == 0]
    return base_params, flat[len(base_params) :]


def init_state(engine: Engine, carried: ExportedState | None = None) -> None:
    """State for every master, before the first step as after it: what is ``carried``, zero moments and step 0
    for the rest.

    ``carried`` is emptied on the way, so that no weight is held twice for longer than its copy takes.
    """
    base_params, guides = master_params(engine)
    assert carried is None or len(carried) == len(base_params), (
        "base parameters' masters are the same with and without a guide"
    )
    state = torch_optimizer(engine).state
    for master in base_params if carried is None else []:
        state[master] = _zero_state(master)
    for master in guides:
        state[master] = _zero_state(master)
    for master in base_params if carried else []:
        master_state = carried.pop(0)  # type: ignore[union-attr]
        master.data.copy_(master_state.pop("weight"))
        state[master] = master_state
    engine.global_steps = step_counts(engine)[0]


def _zero_state(master: Tensor) -> dict[str, Tensor]:
    moments = {key: torch.zeros_like(master.data) for key in MOMENTS}
    return {"step": torch.zeros((), dtype=torch.float32, device=master.device), **moments}


def export_state(engine: Engine) -> ExportedState:
    """The base parameters' state, the tensors themselves: the engine must not be stepped afterwards."""
    state = torch_optimizer(engine).state
    return [
        {"weight": master.data, **{key: state[master][key] for key in ("step", *MOMENTS)}}
        for master in master_params(engine)[0]
    ]


def step_counts(engine: Engine) -> tuple[int, int | None]:
    """Steps that Adam has taken, of the base parameters and of the guide if there is one: skipped steps do
    not count, a guide starts at 0.
    """
    base_params, guides = master_params(engine)
    state = torch_optimizer(engine).state
    return int(state[base_params[0]]["step"]), int(state[guides[0]]["step"]) if guides else None


def set_step_counts(engine: Engine, steps: int, guide_steps: int | None) -> None:
    """Adam's numbers of steps taken, for its bias corrections, and DeepSpeed's.

    Without ``guide_steps`` the guide's is the others'.
    """
    state = torch_optimizer(engine).state
    base_params, guides = master_params(engine)
    for master in base_params:
        state[master]["step"].fill_(steps)
    for master in guides:
        state[master]["step"].fill_(steps if guide_steps is None else guide_steps)
    engine.global_steps = steps


@torch.no_grad()
def update_model_weights(engine: Engine) -> None:
    """Make the model's weights those of the masters, rounded to its precision, as DeepSpeed does after a
    step. All ranks must call it.
    """
    optimizer = engine.optimizer
    if isinstance(optimizer, torch.optim.Optimizer):
        return  # stage 0: they are the masters
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        optimizer._partition_all_parameters()
        for index in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(index)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
    else:
        optimizer.update_lp_params()


# -------------------------------------------------------------------------------------------------- fragments


def _views(engine: Engine, master: Tensor, start: int, numel: int) -> dict[str, Tensor]:
    kept = torch_optimizer(engine).state[master]
    flat = {"weight": master.data, **{key: kept[key] for key in MOMENTS}}
    return {key: tensor.view(-1).narrow(0, start, numel) for key, tensor in flat.items()}


def fragments(engine: Engine) -> Iterator[Fragment]:
    """What this rank holds of every parameter's fp32 weight and moments (nothing of some parameters in
    ZeRO 1-3).
    """
    named_params = list(engine.module.named_parameters())
    optimizer = engine.optimizer
    if isinstance(optimizer, torch.optim.Optimizer):  # stage 0: torch's optimizer itself
        for name, p in named_params:
            yield Fragment(name, 0, p.numel(), _views(engine, p, 0, p.numel()))
    elif hasattr(optimizer, "fp32_partitioned_groups_flat"):
        yield from _stage_3(engine, named_params)
    else:
        yield from _stage_1_2(engine, named_params)


def separate_masters(engine: Engine) -> Iterator[Fragment]:
    """:func:`fragments` where the fp32 weights are other tensors than the model's.

    Nothing in stage 0.
    """
    return iter(()) if isinstance(engine.optimizer, torch.optim.Optimizer) else fragments(engine)


def _stage_1_2(engine: Engine, named_params: list[tuple[str, nn.Parameter]]) -> Iterator[Fragment]:
    """Stages 1 and 2: each data-parallel rank has a range of every group's flat tensor, which may cut a
    parameter.
    """
    flat = [master for group in master_params(engine) for master in group]
    for name, p in named_params:
        mapping = getattr(p, "_hp_mapping", None)
        if mapping is None:
            continue
        inside, outside = mapping.hp_fragment_address, mapping.lp_fragment_address
        master = flat[mapping.param_group_index]
        yield Fragment(name, outside.start, outside.numel, _views(engine, master, inside.start, inside.numel))


def _stage_3(engine: Engine, named_params: list[tuple[str, nn.Parameter]]) -> Iterator[Fragment]:
    """Stage 3: each data-parallel rank has an equal part of every parameter, the last ones padded."""
    optimizer = engine.optimizer
    rank = dist.get_rank(group=optimizer.dp_process_group)
    flat = [master for group in master_params(engine) for master in group]
    for name, parameter in named_params:
        p: Any = parameter
        group, offset, part = optimizer.grad_position[optimizer.get_param_id(p)]
        start = rank * part
        numel = min(part, p.ds_numel - start)
        if numel > 0:
            yield Fragment(name, start, numel, _views(engine, flat[group], offset, numel))


def full_weight(held: dict[str, Fragment], name: str, spec: TensorSpec, topology: Topology) -> Tensor:
    """The full fp32 weight of a parameter from the ranks' fragments ``held`` by name.

    All ranks must call it.
    """
    part = torch.zeros(spec.local_shape(topology.tensor_parallel_size), device=topology.device)
    fragment = held.get(name)
    if fragment is not None:
        part.view(-1)[fragment.start : fragment.start + fragment.numel] = fragment.tensors["weight"]
    whole = fragment is not None and fragment.numel == part.numel()
    if not _on_all_ranks(whole, topology):  # fragments do not overlap: the sum has the very bits
        dist.all_reduce(part, group=topology.data_group)
    if spec.cut is None or topology.tensor_parallel_size == 1:
        return part
    parts = [torch.empty_like(part) for _ in range(topology.tensor_parallel_size)]
    dist.all_gather(parts, part, group=topology.tensor_group)
    return unshard(parts, spec)


def _on_all_ranks(fact: bool, topology: Topology) -> bool:
    flag = torch.tensor(float(fact), device=topology.device)
    dist.all_reduce(flag, op=dist.ReduceOp.MIN, group=topology.data_group)
    return bool(flag)
