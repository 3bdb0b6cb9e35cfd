"""Phase boundaries on whatever ranks there are: what goes on, what is freed; called inside the ranks of a
pool.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import math
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from sffn_dist import model as models
from sffn_dist.checkpoint.manifest import MOMENTS
from sffn_dist.checkpoint.run_folder import latest_checkpoint
from sffn_dist.parallel.split import shard
from sffn_dist.spec import schedule as schedules
from sffn_dist.spec.split_table import ffn_structure, is_guide, model_tensors
from sffn_dist.structured.functional import apply, to_dense
from sffn_dist.training import engine as engines
from sffn_dist.training import engine_state, loop, phases

_spec = importlib.util.spec_from_file_location(
    "training_cases", Path(__file__).with_name("training_cases.py")
)
assert _spec
assert _spec.loader
training = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(training)


# ----------------------------------------------------------------------------------------------------- memory


def live_bytes() -> int:
    """Bytes of every tensor that Python knows of, each storage once.

    Meta tensors hold none, whatever size they name.
    """
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, Tensor) and thing.layout is torch.strided and not thing.is_meta:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def persistent_bytes(tree: dict[str, Any], steps: int, precision: str = "fp32") -> int:
    """What a run holds between two steps, after ``steps`` of them: parameters, gradients, optimizer state,
    DeepSpeed's buffers.
    """
    before = live_bytes()
    with training.parted():
        run = training.begin(tree, precision)
        while run.step < steps:
            training.take(run)
            phases.enter(run)
        held = live_bytes() - before
        engines.destroy(run.engine)
    return held


def boundary(tree: dict[str, Any], at: int, precision: str = "fp32") -> dict[str, Any]:
    """The step before ``at``, the boundary, and one step more: state on both sides, what is left of the old
    engine, guides as they start, and the most memory above the start of the run in each of the three.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded, training.parted():
        run = training.begin(tree, precision)
        while run.step < at - 1:
            training.take(run)
            phases.enter(run)
        if not at:
            weights, stale = full_weights(run), stale_weights(run)
            engines.destroy(run.engine)
            return {"guide_error": _guide_error(run.config, weights), "stale": stale}
        old = [weakref.ref(run.engine), weakref.ref(run.model), weakref.ref(run.engine.optimizer)]
        old += [weakref.ref(parameter) for name, parameter in run.model.named_parameters() if is_guide(name)]
        with record_function("before"):
            training.take(run)
        before, counts = training.state_digests(run.engine), engine_state.step_counts(run.engine)
        with record_function("crossing"):
            phases.enter(run)
        after, counts_after = training.state_digests(run.engine), engine_state.step_counts(run.engine)
        weights, stale = full_weights(run), stale_weights(run)
        fresh = _moments_of_guides(run)
        with record_function("after"):
            training.take(run)
        alive = sum(ref() is not None for ref in old)
        engines.destroy(run.engine)
    return {
        "before": before,
        "after": after,
        "counts": (counts, counts_after),
        "alive": alive,
        "guide_error": _guide_error(run.config, weights),
        "guide_moments": fresh,
        "stale": stale,
        "peaks": peaks(recorded, "before", "crossing", "after"),
    }


def full_weights(run: Any) -> dict[str, Tensor]:
    """Every parameter's full fp32 weight."""
    specs = model_tensors(run.config, guide=models.has_guide(run.model))
    held = {fragment.name: fragment for fragment in engine_state.fragments(run.engine)}
    return {
        name: engine_state.full_weight(held, name, spec, run.topology).clone() for name, spec in specs.items()
    }


def stale_weights(run: Any) -> list[str]:
    """Parameters whose value on this rank is not the fp32 weight rounded to the model's precision."""
    full, specs, found = full_weights(run), model_tensors(run.config, guide=True), []
    held = {fragment.name: fragment for fragment in engine_state.fragments(run.engine)}
    for name, parameter in run.model.named_parameters():
        mine = (
            shard(
                full[name], specs[name], run.topology.tensor_parallel_size, run.topology.tensor_parallel_rank
            )
            .view(-1)
            .to(parameter.dtype)
        )
        if hasattr(parameter, "ds_tensor"):  # ZeRO 3: this rank's part
            fragment = held.get(name)
            start, numel = (fragment.start, fragment.numel) if fragment else (0, 0)
            same = torch.equal(parameter.ds_tensor.view(-1)[:numel], mine[start : start + numel])
        else:
            same = torch.equal(parameter.detach().view(-1), mine)
        if not same:
            found.append(name)
    return found


def _moments_of_guides(run: Any) -> float:
    """The largest moment of any guide on this rank."""
    held = [fragment for fragment in engine_state.fragments(run.engine) if is_guide(fragment.name)]
    return max(
        (float(fragment.tensors[kind].abs().max()) for fragment in held for kind in MOMENTS), default=0.0
    )


def finish(tree: dict[str, Any]) -> tuple[list[str], bool, bool]:
    """The run to its end by the product's own loop: tensors in its last checkpoint, whether a second start
    reads it, whether it agrees.
    """
    run = training.begin(tree)
    loop.train(run)
    last = full_weights(run)
    manifest = latest_checkpoint(Path(run.config.run.dir))
    assert manifest
    engines.destroy(run.engine)
    again = training.begin(tree)
    there = full_weights(again)
    same = all(torch.equal(there[name], last[name]) for name in there)
    done = again.step == run.schedule.total_steps and not models.has_guide(again.model)
    engines.destroy(again.engine)
    return sorted(manifest.shapes), done, same


def _guide_error(config: Any, weights: dict[str, Tensor]) -> float | None:
    """Largest |W - to_dense(U, V)|; None without guides."""
    errors = [
        float((weights[name] - _product(config, weights, name)).abs().max())
        for name in weights
        if is_guide(name)
    ]
    return max(errors) if errors else None


def _product(config: Any, weights: dict[str, Tensor], guide: str) -> Tensor:
    prefix, layer = guide.removesuffix("guide"), int(guide.split(".")[2])
    factors = {
        n.removeprefix(prefix): w
        for n, w in weights.items()
        if n.startswith(prefix) and not n.endswith(("guide", "bias"))
    }
    return to_dense(ffn_structure(config, layer), factors)


def peaks(recorded: Any, *names: str) -> dict[str, int]:
    """The most bytes allocated at once within each named range, above those at the start of the record."""
    events = recorded.profiler.kineto_results.events()
    ranges = {e.name(): (e.start_ns(), e.start_ns() + e.duration_ns()) for e in events if e.name() in names}
    most, now = dict.fromkeys(names, 0), 0
    for when, change in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        now += change
        for name, (start, end) in ranges.items():
            if start <= when <= end:
                most[name] = max(most[name], now)
    return most


# -------------------------------------------------------------------------------------------------- reference


class PlainLinear(nn.Module):
    """A structured linear by autograd over the plain operations: y = alpha W x + (1 - alpha) U(V x), bias
    left to the caller.
    """

    def __init__(self, like: Any):
        super().__init__()
        self.structure, self.alpha = like.structure, None
        self.tensors = nn.ParameterDict(
            {name: nn.Parameter(getattr(like, name).detach().clone()) for name in like.specs}
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        factors = {name: tensor for name, tensor in self.tensors.items() if name not in ("guide", "bias")}
        y = apply(self.structure, x, factors)
        if self.alpha is not None:
            y = self.alpha * F.linear(x, self.tensors["guide"]) + (1 - self.alpha) * y
        return y, self.tensors.get("bias")


class Reference:
    """The run's mathematics in one process: plain autograd, torch's AdamW, no DeepSpeed, no phases but "a
    guide is or is not there".
    """

    def __init__(self, tree: dict[str, Any]):
        self.config = training.loading.from_tree(tree)
        self.clock = schedules.build_schedule(self.config)
        ranks = training.join(self.config)
        self.model = models.build(self.config, "fp32", ranks, guide=self.clock.guided(0))
        models.initialise(self.model, self.config, ranks)
        self.linears = []
        for layer, which, linear in list(models.structured_linears(self.model)):
            plain = PlainLinear(linear)
            setattr(self.model.decoder.layers[layer].mlp, ("linear_fc1", "linear_fc2")[which], plain)
            self.linears.append(plain)
        train = self.config.train
        guides = [linear.tensors["guide"] for linear in self.linears if "guide" in linear.tensors]
        survivors = [p for name, p in self.model.named_parameters() if not is_guide(name)]
        settings = {
            "betas": (train.beta1, train.beta2),
            "eps": train.epsilon,
            "weight_decay": train.weight_decay,
        }
        self.adam = torch.optim.AdamW(survivors, **settings)
        if guides:
            self.adam.add_param_group({"params": guides})
        vocab, sequence = self.config.model.vocab, self.config.model.sequence
        self.batches = training.Batches(training.tokens(vocab), sequence, train.global_batch_size, train.seed)

    def weights(self) -> dict[str, Tensor]:
        """By the run's names."""
        return {
            name.replace(".tensors.", "."): p.detach().clone() for name, p in self.model.named_parameters()
        }

    def step(self, step: int, drawn: bool) -> float:
        """One step on the whole batch; the loss."""
        self._bring_or_drop_guides(self.clock.guide_begin <= step < self.clock.guide_end)
        now, train = self.clock.at(step), self.config.train
        done = (step - self.clock.guide_begin) / max(1, self.clock.guide_end - self.clock.guide_begin)
        for linear in self.linears:
            linear.alpha = (1 + math.cos(math.pi * done)) / 2 if drawn and "guide" in linear.tensors else None
        batch = torch.from_numpy(self.batches.at(now.data_step)[0])
        loss = models.token_losses(self.model, batch[:, :-1].contiguous(), batch[:, 1:].contiguous()).mean()
        self.adam.zero_grad()
        loss.backward()
        for parameter in self.model.parameters():
            if parameter.grad is None:  # an undrawn guide's gradient is zero, not absent
                parameter.grad = torch.zeros_like(parameter)
        nn.utils.clip_grad_norm_(self.model.parameters(), train.clip)
        for group in self.adam.param_groups:
            group["lr"] = train.learning_rate * now.learning_rate_factor
        self.adam.step()
        return float(loss)

    def _bring_or_drop_guides(self, guided: bool) -> None:
        if guided == ("guide" in self.linears[0].tensors):
            return
        if guided:
            weights = self.weights()
            for name, module in self.model.named_modules():
                if isinstance(module, PlainLinear):
                    module.tensors["guide"] = nn.Parameter(_product(self.config, weights, f"{name}.guide"))
            self.adam.add_param_group({"params": [linear.tensors["guide"] for linear in self.linears]})
        else:
            del self.adam.param_groups[1]
            for linear in self.linears:
                del linear.tensors["guide"]


@contextlib.contextmanager
def forced(coins: Sequence[int], begin: int) -> Iterator[None]:
    """The coin shows ``coins`` in the steps from ``begin`` on, for every linear."""
    usual = schedules.uniform

    def uniform(seed: int, step: int, layer: int, linear: int) -> float:
        return 0.0 if coins[step - begin] else 1.0

    schedules.uniform = uniform
    try:
        yield
    finally:
        schedules.uniform = usual


def against_reference(tree: dict[str, Any], coins: Sequence[int], steps: int) -> dict[str, Any]:
    """Largest differences of losses in each phase, and of full weights at the end of the guided one and at
    the end.
    """
    reference = Reference(tree)
    begin, end = reference.clock.guide_begin, reference.clock.guide_end
    losses: dict[str, float] = {"before": 0.0, "guided": 0.0, "after": 0.0}
    weights: dict[str, float] = {}
    seen = []

    def compare(ours: dict[str, Tensor]) -> float:
        theirs = reference.weights()
        assert ours.keys() == theirs.keys()
        return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)

    with forced(coins, begin), training.parted():
        run = training.begin(tree)
        while run.step < steps:
            step = run.step
            ours, _, drawn = training.take(run)
            theirs = reference.step(step, begin <= step < end and bool(coins[step - begin]))
            phase = "before" if step < begin else "guided" if step < end else "after"
            losses[phase] = max(losses[phase], abs(ours - theirs))
            seen.append(drawn > 0)
            if run.step == end:
                weights["guided"] = compare(full_weights(run))
            phases.enter(run)
        weights["end"] = compare(full_weights(run))
        engines.destroy(run.engine)
    return {"losses": losses, "weights": weights, "drawn": seen[begin:end]}
