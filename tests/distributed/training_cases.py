"""Real training of a tiny model under the engine, on whatever ranks there are; called inside the ranks of
a pool.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from sffn_kernels import dispatch, launching

from sffn_dist import model as models
from sffn_dist.checkpoint import writer
from sffn_dist.checkpoint.manifest import KINDS, Manifest
from sffn_dist.checkpoint.reader import Reader
from sffn_dist.data.batches import Batches
from sffn_dist.data.shards import HeldoutSample
from sffn_dist.parallel import cpu_compat, topology
from sffn_dist.parallel.feed_forward import StructuredMLP
from sffn_dist.parallel.ledger import Ledger
from sffn_dist.parallel.linear_hooks import is_unhooked
from sffn_dist.spec import config as configs
from sffn_dist.spec import loading
from sffn_dist.spec import schedule as schedules
from sffn_dist.spec.plan import communication
from sffn_dist.spec.split_table import model_tensors
from sffn_dist.training import engine as engines
from sffn_dist.training import engine_state, partial_sums, phases, resume
from sffn_dist.training.bad_steps import BadSteps
from sffn_dist.training.hooks import checkpoint
from sffn_dist.training.run import TrainingRun


def tokens(vocab: int) -> np.ndarray:
    """A stream with something to learn: each token depends on the one before."""
    noise = np.random.default_rng(5).integers(0, 7, 20_000)
    return (np.cumsum(noise) % vocab).astype(np.uint16)


def join(config: configs.Config) -> topology.Topology:
    """This rank's place in the pool."""
    cpu_compat.prepare()
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return topology.groups(config.parallel.tensor)


@contextlib.contextmanager
def summed_at_once(elements: int) -> Iterator[None]:
    """Partial gradients are summed over the tensor-parallel group in buckets of this size."""
    usual, partial_sums.BUCKET = partial_sums.BUCKET, elements
    yield
    partial_sums.BUCKET = usual


def train(
    tree: dict[str, Any],
    steps: int,
    save_at: int | None = None,
    precision: str = "fp32",
    nan_at: int | None = None,
    part_all: bool = False,
    bucket: int | None = None,
    sums: int = partial_sums.BUCKET,
) -> dict[str, Any]:
    """Losses and gradient norms of ``steps`` steps (from the newest checkpoint in run.dir, if any), then what
    came out.

    ``nan_at``: the step whose loss is made nan. ``part_all``: ZeRO 3 parts and frees every parameter; it
    would leave such small ones whole. ``bucket``: elements that ZeRO reduces at once; ``sums``: that are
    summed at once over the tensor-parallel group.
    """
    with (
        summed_at_once(sums),
        zero_settings(
            **({"stage3_param_persistence_threshold": 0} if part_all else {}),
            **({"reduce_bucket_size": bucket} if bucket else {}),
        ),
    ):
        run = begin(tree, precision)
        config, start = run.config, run.step
        losses, norms, drawn = [], [], []
        for step in range(start, steps):
            value, norm, some = take(run, nan=step == nan_at)
            losses.append(value)
            norms.append(norm)
            drawn.append(some)
            phases.enter(run)
            if step + 1 == save_at:
                save(run)
    result = {
        "losses": losses,
        "norms": norms,
        "drawn": drawn,
        "start": start,
        "optimizer": type(run.engine.optimizer).__name__,
    }
    result["adam_steps"] = engine_state.step_counts(run.engine)[0]
    result["replicas"] = differing_replicas(run.engine, config, run.topology)
    result["state"] = state_digests(run.engine)
    if "run" in tree:
        save(run)
    engines.destroy(run.engine)
    return result


def begin(tree: dict[str, Any], precision: str = "fp32") -> TrainingRun:
    """A run as pretrain.py makes it, on the toy tokens, without reports."""
    config = loading.from_tree(tree)
    ranks = join(config)
    torch.manual_seed(1)
    batches = Batches(
        tokens(config.model.vocab), config.model.sequence, config.train.global_batch_size, config.train.seed
    )
    length = config.model.sequence + 1
    windows = tokens(config.model.vocab)[: 2 * length].astype(np.int64).reshape(2, length)
    heldout = HeldoutSample(windows, windows[:, 1:].size)
    run_dir = Path(config.run.dir)
    saver, bad_steps = writer.Saver(run_dir, config, ranks), BadSteps(config.guards, run_dir)
    clock = schedules.build_schedule(config)
    start = resume.find_start(
        config,
        ranks,
        saver.tokenizer,
        resume.latest_good_checkpoint(run_dir, ranks) if config.run.dir else None,
    )
    bad_steps.reset(start.recent_losses)
    model = models.build(config, precision, ranks, guide=clock.guided(start.step))
    if start.from_seed:
        models.initialise(model, config, ranks)
    engine = engines.create(model, config, precision, ranks)
    resume.load_state(engine, config, ranks, start)
    run = TrainingRun(
        config, precision, clock, ranks, batches, heldout, "test", saver, bad_steps, engine, start.step
    )
    return run


def take(run: TrainingRun, nan: bool = False) -> tuple[float, float, int]:
    """The run's next step: mean loss over all ranks, gradient norm, guides drawn.

    ``nan``: its loss is made nan.
    """
    now, config, ranks = run.schedule.at(run.step), run.config, run.topology
    drawn = models.set_guide(run.model, run.schedule, now)
    engines.set_recipe(run.engine, config.train, config.train.learning_rate * now.learning_rate_factor)
    micro = run.batches.at(
        now.data_step,
        ranks.data_parallel_rank,
        ranks.data_parallel_size,
        micro_batch_size=config.train.micro_batch_size,
    )

    def loss(batch: torch.Tensor) -> torch.Tensor:
        mean = models.token_losses(run.engine, batch[:, :-1].contiguous(), batch[:, 1:].contiguous()).mean()
        return mean * float("nan") if nan else mean

    result = engines.train_batch(
        run.engine, loss, iter([torch.from_numpy(part) for part in micro]), config.train.clip
    )
    total = torch.tensor(result.loss)
    dist.all_reduce(total, group=ranks.data_group)
    run.step += 1
    return float(total) / ranks.data_parallel_size, result.grad_norm, drawn


def parted() -> contextlib.AbstractContextManager[None]:
    """Engines made inside part and free every parameter in ZeRO 3; it would leave such small ones whole."""
    return zero_settings(stage3_param_persistence_threshold=0)


@contextlib.contextmanager
def zero_settings(**settings: Any) -> Iterator[None]:
    """Engines made inside have these settings of DeepSpeed's ZeRO."""
    usual = engines.deepspeed_config

    def changed(*arguments: Any, **options: Any) -> dict[str, Any]:
        tree = usual(*arguments, **options)
        tree["zero_optimization"].update(settings)
        return tree

    engines.deepspeed_config = changed
    try:
        yield
    finally:
        engines.deepspeed_config = usual


def received(tree: dict[str, Any]) -> tuple[dict[str, float], dict[str, Any]]:
    """Elements by purpose that this rank receives from its tensor-parallel group in one step of the
    engine; what the plan says.
    """
    config = loading.from_tree(tree)
    ranks = join(config)
    model = models.build(config, "fp32", ranks, guide=False)
    models.initialise(model, config, ranks)
    engine = engines.create(model, config, "fp32", ranks)
    batches = Batches(
        tokens(config.model.vocab), config.model.sequence, config.train.global_batch_size, config.train.seed
    )
    micro = batches.at(
        0, ranks.data_parallel_rank, ranks.data_parallel_size, micro_batch_size=config.train.micro_batch_size
    )

    def loss(batch: torch.Tensor) -> torch.Tensor:
        return models.token_losses(engine, batch[:, :-1].contiguous(), batch[:, 1:].contiguous()).mean()

    with Ledger(model, {"tensor": ranks.tensor_group, "data": ranks.data_group}) as ledger:
        engines.train_batch(engine, loss, iter([torch.from_numpy(part) for part in micro]), config.train.clip)
    engines.destroy(engine)
    purposes = ("forward", "backward", "gradient")
    found = {purpose: float(ledger.elements(group="tensor", purpose=purpose)) for purpose in purposes}
    return found, communication(config, "fp32", ranks.data_parallel_size)["step"]


def save(run: TrainingRun) -> None:
    checkpoint.save(run)
    assert checkpoint.finished_save(run)


def state_digests(engine: Any) -> dict[str, str]:
    """Hash of every fragment's weight and moments."""
    return {
        f"{fragment.name}/{fragment.start}/{kind}": hashlib.sha256(
            tensor.detach().float().numpy().tobytes()
        ).hexdigest()
        for fragment in engine_state.fragments(engine)
        for kind, tensor in fragment.tensors.items()
    }


def differing_replicas(engine: Any, config: configs.Config, ranks: Any) -> list[str]:
    """Fragments of replicated parameters whose bits differ over the tensor-parallel group."""
    specs = model_tensors(config, guide=True)
    mine = {
        key: value for key, value in state_digests(engine).items() if specs[key.split("/")[0]].cut is None
    }
    everyone: list[Any] = [None] * ranks.tensor_parallel_size
    dist.all_gather_object(everyone, mine, group=ranks.tensor_group)
    return [key for key in mine if any(other.get(key) != mine[key] for other in everyone)]


def full_weights(tree: dict[str, Any], step: int) -> dict[str, np.ndarray]:
    """Full fp32 weights and moments of a saved step."""
    config = loading.from_tree(tree)
    manifest = Manifest.read(Path(config.run.dir) / "checkpoints" / f"step_{step:08d}")
    reader = Reader(manifest)
    return {f"{name}/{kind}": reader.full(name, kind).numpy() for name in manifest.shapes for kind in KINDS}


def failed_save(tree: dict[str, Any], step: int) -> tuple[str, list[str]]:
    """A save in which the last rank's disk is full: what every rank hears, and what is left in run.dir."""
    config = loading.from_tree(tree)
    ranks = join(config)
    model = models.build(config, "fp32", ranks, guide=False)
    models.initialise(model, config, ranks)
    engine = engines.create(model, config, "fp32", ranks)
    held = engine_state.fragments(engine)

    def full_disk() -> Any:
        for fragment in held:
            if ranks.rank == ranks.world_size - 1:
                raise OSError(28, "No space left on device")
            yield fragment

    saver = writer.Saver(Path(config.run.dir), config, ranks)
    saver.save(writer.Position(step, step, None, None), full_disk())
    message = "saved" if saver.wait() else "; ".join(saver.pop_failures())
    engines.destroy(engine)
    return message, sorted(path.name for path in (Path(config.run.dir) / "checkpoints").iterdir())


def evaluated_first(tree: dict[str, Any], steps: int) -> dict[str, Any]:
    """An engine that evaluates before its first step, every parameter parted and free, then trains,
    evaluating after each step.

    ``losses``: of the evaluations; ``direct``: whether each structured layer's bottlenecks were one
    operation, and without hooks.
    """
    from sffn_dist.inference.evaluation import evaluate

    with parted():
        run = begin(tree)

        def measure() -> float:
            heldout = run.heldout
            return evaluate(
                run.model, models.token_losses, heldout.windows, heldout.text_bytes, 1, run.topology
            ).loss

        losses, direct = [measure()], set()
        for _ in range(steps):
            take(run)
            models.unset_guide(run.model)
            losses.append(measure())
            for module in run.model.modules():
                if isinstance(module, StructuredMLP):
                    direct.add(all(is_unhooked(linear) for linear in (module.linear_fc1, module.linear_fc2)))
        engines.destroy(run.engine)
    return {"losses": losses, "direct": sorted(direct)}


def train_by(kernels: str, **arguments: Any) -> dict[str, Any]:
    """:func:`train` with kernels of one setting, Triton's in its interpreter; ``launched``: the names of
    those that ran.
    """
    launched: set[str] = set()
    modules = [
        importlib.import_module(f"sffn_kernels.{op}_triton") for op in ("block_diagonal", "bottleneck", "mix")
    ]
    usual = launching.launch

    def seen(kernel: Any, *rest: Any, **more: Any) -> None:
        launched.add(kernel.fn.__name__)
        usual(kernel, *rest, **more)

    try:
        for module in modules:
            module.launch = seen
        with dispatch.using(kernels):
            return {**train(**arguments), "launched": sorted(launched)}
    finally:
        for module in modules:
            module.launch = usual
