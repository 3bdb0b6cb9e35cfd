"""config -> DeepSpeed engine, its step and its end. The only module that imports deepspeed.

What of an engine is the run's state: engine_state.py.
"""

from __future__ import annotations

import gc
import inspect
import logging
import math
import os
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor, nn

from sffn_dist.parallel import cpu_compat, partial_gradients
from sffn_dist.parallel.feed_forward import StructuredMLP
from sffn_dist.parallel.topology import ModelParallelUnit, Topology
from sffn_dist.spec.config import Config, Train
from sffn_dist.spec.counts import reduce_bucket
from sffn_dist.spec.optimizers import OPTIMIZERS
from sffn_dist.spec.split_table import is_guide
from sffn_dist.training import engine_state
from sffn_dist.training.device_order import DeviceOrder
from sffn_dist.training.engine_state import Engine, ExportedState
from sffn_dist.training.partial_sums import sum_partial

os.environ.setdefault("DS_ACCELERATOR", "cuda" if cpu_compat.has_cuda() else "cpu")
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)

import deepspeed  # noqa: E402  (the accelerator is chosen at import)
from deepspeed.runtime.zero import parameter_offload  # noqa: E402
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator  # noqa: E402


def deepspeed_config(config: Config, precision: str, data_parallel: int, *, guide: bool) -> dict[str, Any]:
    """DeepSpeed's own dictionary for this run, in its guided phase or outside of it."""
    stage, bf16 = config.zero.stage, precision == "bf16"
    tree: dict[str, Any] = {
        "train_batch_size": config.train.global_batch_size,
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": config.accumulation_steps(data_parallel),
        "gradient_clipping": config.train.clip if stage > 0 else 0.0,  # stage 0: see _clip
        "steps_per_print": 2**62,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": cpu_compat.has_cuda() and stage > 0,
            "reduce_bucket_size": reduce_bucket(config, guide=guide),
        },
        "bf16": {"enabled": bf16},
        # it waits for the device twice a micro-step; the run measures its own speed
        "timers": {"throughput": {"enabled": False}},
        # over the data-parallel ranks
        "communication_data_type": config.zero.reduces_in(precision),
    }
    if bf16:
        # sums over micro-steps in fp32: hundreds of bf16 additions would lose the small gradients
        tree["data_types"] = {"grad_accum_dtype": "fp32"}
        # stage 1: each gradient joins its sum, and is freed, as it arrives, not all after the backward pass
        tree["bf16"]["immediate_grad_update"] = True
    return tree


def create(
    model: nn.Module, config: Config, precision: str, topology: Topology, carried: ExportedState | None = None
) -> Engine:
    """Wrap the model: the optimizer on everything (the guide as its own last group), ZeRO, precision,
    clipping, accumulation.

    The learning rate is 0 until :func:`set_recipe`; optimizer state exists from the start, all zero,
    or what is ``carried`` over from another engine (then engine_state.update_model_weights sets the model's
    weights).
    """
    _patch_deepspeed()
    named_params = list(model.named_parameters())
    groups = [[p for n, p in named_params if not is_guide(n)], [p for n, p in named_params if is_guide(n)]]
    optimizer = pkgutil.resolve_name(OPTIMIZERS[config.train.optimizer])(
        [group for group in groups if group], config.train
    )
    if config.zero.stage == 3:
        # it computes with its linears' weights without calling them: gather them when it is called, forward
        # and backward
        deepspeed.utils.set_z3_leaf_modules(model, [StructuredMLP], raise_if_not_found=False)
    settings = deepspeed_config(config, precision, topology.data_parallel_size, guide=bool(groups[1]))
    with _device_as_local_rank(topology.device):
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=settings,
            mpu=ModelParallelUnit(),
            dist_init_required=False,
        )
    _reduce_in_buckets(engine, settings["zero_optimization"]["reduce_bucket_size"])
    engine.partial_parameters = partial_gradients.defer(model)  # summed by _finish_gradients, once a step
    engine_state.init_state(engine, carried)
    return engine


def _reduce_in_buckets(engine: Engine, elements: int) -> None:
    """Make stages 0 and 1 reduce at most so many elements at once: they copy what they reduce, and take 500 M
    at once otherwise, in bf16 all sums of a group.
    """
    optimizer = engine.optimizer
    if hasattr(optimizer, "non_expert_gradients"):  # stage 1 in bf16
        optimizer.non_expert_gradients = [
            part for flat in optimizer.non_expert_gradients for part in flat.split(elements)
        ]
    # a bucket is reduced once it holds more than this
    engine.allreduce_gradients = partial(engine.allreduce_gradients, bucket_size=elements - 1)


@contextmanager
def _device_as_local_rank(device: torch.device) -> Iterator[None]:
    """LOCAL_RANK as DeepSpeed reads it, the index of this rank's device: a rank that sees only its own
    device (Slurm's --gpus-per-task) has the first one, whatever its place on the node.
    """
    local_rank = os.environ["LOCAL_RANK"]
    if device.type == "cuda":
        os.environ["LOCAL_RANK"] = str(device.index)
    try:
        yield
    finally:
        os.environ["LOCAL_RANK"] = local_rank


def _patch_deepspeed() -> None:
    """Patch three things of DeepSpeed.

    The bf16 optimizer prints no memory report at each start. On CPUs gloo takes the place of an extension
    that compiles for minutes. On CUDA the device waits for reductions of gradients, not the host.
    """
    from deepspeed.runtime import bf16_optimizer
    from deepspeed.runtime.zero import stage3, stage_1_and_2

    bf16_optimizer.see_memory_usage = lambda *_, **__: None
    if not cpu_compat.has_cuda():
        ops: Any = deepspeed.ops.__compatible_ops__
        ops["deepspeed_shm_comm"] = False
        return
    for module in (stage_1_and_2, stage3):
        order = DeviceOrder(deepspeed.accelerator.get_accelerator())
        module.get_accelerator = lambda order=order: order


def destroy(engine: Engine) -> None:
    """Take the engine apart: it, its model and all that they hold are freed once the caller's own references
    are gone.

    DeepSpeed's own ``destroy`` leaves the model in its list of running modules (ZeRO 3 asks for the innermost
    one), parts of the engine in the cache of a method, and on each parameter methods bound to it, reference
    cycles that the collector misses; Megatron caches rotary tables.
    """
    engine.destroy()
    for parameter in engine.module.parameters():
        parameter.__dict__.clear()
    parameter_offload.FWD_MODULE_STACK.clear()
    # private names: a test fails if another version has others, a run need not end for it
    with suppress(AttributeError):
        RotaryEmbedding.forward.cache_clear()
    with suppress(AttributeError, KeyError, TypeError):
        kept = PartitionedParameterCoordinator._PartitionedParameterCoordinator__params_to_release
        inspect.getclosurevars(kept).nonlocals["func"].cache_clear()  # wrapped for NVTX ranges


def free_memory(device: torch.device) -> None:
    """Give back what nothing refers to any more: engines and their models hold each other in reference
    cycles.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the next engine's tensors are of other sizes


def set_recipe(engine: Engine, train: Train, learning_rate: float) -> None:
    """The optimizer's settings for the next step: they may change in a run (pretrain.py --change)."""
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate
        group["betas"] = (train.beta1, train.beta2)
        group["eps"], group["weight_decay"] = train.epsilon, train.weight_decay
    if engine.zero_optimization_stage() > 0:  # stage 0: see _clip
        engine.optimizer.clip_grad = train.clip


# ----------------------------------------------------------------------------------------------------- a step


class Decision(Protocol):
    """Whether a step's update is made; the same on every rank."""

    @property
    def skip_reason(self) -> str | None:
        """Why it is not made; None if it is."""


D = TypeVar("D", bound=Decision)


@dataclass(frozen=True)
class Accepted:
    """The decision where nobody asks: the update is made."""

    skip_reason: str | None = None


@dataclass(frozen=True)
class EngineStep(Generic[D]):
    """What came of one optimizer step on this rank."""

    loss: float  # nats, mean over the rank's micro-batches
    grad_norm: float  # global, before clipping; not finite where no update was made
    decision: D


def train_batch(
    engine: Engine,
    loss_fn: Callable[[Any], Tensor],
    micro_batches: Iterator[Any],
    clip: float,
    decide: Callable[[float], D] = lambda loss: Accepted(),  # type: ignore[assignment,return-value]
) -> EngineStep[D]:
    """One optimizer step over the rank's micro-batches.

    ``decide``, called with the mean loss on every rank, says whether the update is made. Where it is not, and
    where a gradient is not finite, nothing changes: no weight, no moment, no count.
    """
    total: Tensor | None = None
    norm: float | None = None
    decision: D | None = None
    mean, count = math.nan, 0
    for micro_batch in micro_batches:
        loss = loss_fn(micro_batch)
        engine.backward(loss)
        total, count = loss.detach() if total is None else total + loss.detach(), count + 1
        if engine.is_gradient_accumulation_boundary():
            mean = float(total) / count
            decision = decide(mean)
            norm = _finish_gradients(engine, decision.skip_reason is None, clip)
        engine.step()
    assert decision is not None, "a step needs a micro-batch"
    assert engine.micro_steps % engine.gradient_accumulation_steps() == 0
    return EngineStep(mean, float(engine.get_global_grad_norm()) if norm is None else norm, decision)


def _finish_gradients(engine: Engine, allowed: bool, clip: float) -> float | None:
    """Before the optimiser's step: the sum of partial gradients; in stage 0 norm and clipping.

    In every stage, what keeps back an update that is not to be made.
    """
    if allowed:
        sum_partial(engine, engine.partial_parameters)
    if engine.zero_optimization_stage() > 0:
        if not allowed:
            _force_skip(engine)
        return None
    norm = _gradient_norm(engine) if allowed else math.inf
    if math.isfinite(norm):
        _clip(engine, norm, clip)
    else:  # as the other stages do: no step, nothing decays
        engine.optimizer.zero_grad(set_to_none=True)
    return norm


def _gradient_norm(engine: Engine) -> float:
    """Global L2 norm of the averaged gradients.

    A parameter replicated over the tensor-parallel group counts once.

    For stage 0, whose own norm DeepSpeed 0.19 does not report.
    """
    mpu = engine.mpu
    first = mpu.get_tensor_model_parallel_rank() == 0
    owned = [
        p for p in engine.module.parameters() if p.grad is not None and (first or p.tensor_model_parallel)
    ]
    squares = [p.grad.square().sum() for p in owned]
    total = torch.stack(squares).sum() if squares else torch.zeros((), device=engine.device)
    torch.distributed.all_reduce(total, group=mpu.get_tensor_model_parallel_group())
    return float(total.sqrt())


def _force_skip(engine: Engine) -> None:
    """Stages 1-3 skip a step whose gradients are not finite, on all ranks: there is no other way in
    DeepSpeed 0.19 to have it skipped.
    """
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_groups_gradients_flat"):  # stage 1 in bf16 sums in fp32, whole
        held = optimizer.fp32_groups_gradients_flat
    else:
        held = [
            part
            for parts in optimizer.averaged_gradients.values()
            for part in parts or ()
            if part is not None
        ]
    for part in held:
        part.fill_(math.nan)


def _clip(engine: Engine, norm: float, limit: float) -> None:
    """Scale all gradients so that their global norm is at most ``limit`` (0: no limit), as torch's
    clip_grad_norm_ does.
    """
    if 0.0 < limit < norm:
        for parameter in engine.module.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(limit / (norm + 1e-6))
