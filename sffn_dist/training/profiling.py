"""``profile.steps``: some steps under torch's profiler (telemetry/profiler.py), on the ranks of
``profile.ranks``.

The ranges that time is told apart by are put on before a profiled step and taken off after it. A rank or a
run that profiles nothing takes its steps as if this module did not exist. Nothing here ends a run.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.mlp import MLP
from torch import nn
from torch.autograd.profiler import record_function

from sffn_dist.launch import exit_codes
from sffn_dist.parallel.feed_forward import StructuredMLP
from sffn_dist.spec.profiled_steps import describe, folder, profiled_steps
from sffn_dist.telemetry.profiler import Profiler
from sffn_dist.telemetry.time_by_cause import STEP, WAITING, Cause
from sffn_dist.training import engine as engines
from sffn_dist.training.interruption import TRAINING
from sffn_dist.training.run import TrainingRun
from sffn_dist.training.step_result import StepResult

_log = logging.getLogger(__name__)
T = TypeVar("T")
Step = Callable[[TrainingRun], StepResult]

_DATA, _LOSS, _OPTIMIZER = "data", "loss", "optimizer"
_REGIONS = {_DATA: Cause.DATA, _LOSS: Cause.LOSS, _OPTIMIZER: Cause.OPTIMIZER}


@contextlib.contextmanager
def profiled(run: TrainingRun, step: Step) -> Iterator[Step]:
    """``step``, under the profiler where it is due; without ``profile.steps`` just that function."""
    config, total = run.config, run.schedule.total_steps
    steps = profiled_steps(config, total, run.step)
    if (text := describe(config, total, run.step)) and run.reports:
        run.reports.progress.note(f"profile: {text}")
    if not steps or run.topology.rank not in config.profile.ranks:
        yield step
        return
    profiled_step = _ProfiledStep(step, steps)
    try:
        yield profiled_step
    except BaseException:
        profiled_step.discard()
        raise
    profiled_step.finish(run)


class _ProfiledStep:
    """A step that records itself while ``run.step`` is in ``steps``, once."""

    def __init__(self, step: Step, steps: range):
        self._step, self._steps = step, steps
        self._profiler: Profiler | None = None
        self._regions: dict[str, Cause] = {}
        self._taken: list[int] = []
        self._over = self._stopped = self._warned = False

    def __call__(self, run: TrainingRun) -> StepResult:
        if run.step not in self._steps:
            self.finish(run)  # the last of them were skipped, or the run was taken back
        elif not self._over:
            return self._record(run)
        return self._step(run)

    def _record(self, run: TrainingRun) -> StepResult:
        number, ranges = run.step, contextlib.ExitStack()
        with self._guarded():
            if self._profiler is None:
                self._profiler = Profiler(run.topology.device)
            self._profiler.start()
            self._regions |= _put_on(ranges, run)
            ranges.enter_context(record_function(f"{STEP}{number}"))
        if self._profiler is None:
            ranges.close()  # it failed: the step is as any other
        with ranges:
            result = self._step(run)
            if self._profiler:
                with self._guarded():
                    self._profiler.synchronize()
        # a signal's deadline runs: the state is saved, the profile is not
        self._stopped = result.stop is not None and result.stop.exit_code != exit_codes.DONE
        if self._profiler and not self._stopped:
            with self._beside(run):
                self._profiler.collect()
            self._taken.append(number)
            if number + 1 == self._steps.stop:
                self.finish(run)
        return result

    def finish(self, run: TrainingRun) -> None:
        """Write what was recorded, if anything was."""
        if self._stopped:
            run.tell("profile", "profile: discarded, the run was stopped while it was recorded")
            self.discard()
        profiler, self._profiler = self._profiler, None
        if profiler is None or not self._taken:
            return
        self._over = True
        target = folder(run.config.run.dir, range(min(self._taken), max(self._taken) + 1))
        with self._beside(run):
            text = profiler.write(target, run.topology.rank, self._regions)
            self._report(run, target, text)

    def _report(self, run: TrainingRun, target: Path, text: str) -> None:
        if run.topology.rank == min(run.config.profile.ranks):
            run.tell("profile", f"profile: {target}\n{text.rstrip()}")

    def discard(self) -> None:
        """Stop recording, write nothing."""
        profiler, self._profiler, self._over = self._profiler, None, True
        if profiler:
            with self._guarded():
                profiler.close()

    @contextlib.contextmanager
    def _beside(self, run: TrainingRun) -> Iterator[None]:
        """What is no part of a step: a stop need not wait for it, the state is that before the next step."""
        with (
            self._guarded(),
            run.watchdog.waiving_hangs("writing a profile"),
            run.interruption.allowed(run.step, TRAINING),
        ):
            yield

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """What fails inside ends the profile, with a warning, and not the run."""
        try:
            yield
        except Exception as error:
            if not self._warned:
                self._warned = True
                reason = f"{type(error).__name__}: {error}"
                _log.warning("profile.steps: cannot be recorded, training goes on without: %s", reason)
            self.discard()


# ----------------------------------------------------------------------------------------------------- ranges


def _put_on(ranges: contextlib.ExitStack, run: TrainingRun) -> dict[str, Cause]:
    """Put a step's ranges on, to be taken off by ``ranges``; returns what runs in them by name.

    A module's range bears its name. The linears of a structured feed-forward layer get none: hooks on them
    would change how they are computed.
    """
    regions = dict(_REGIONS)
    for name, module in run.model.named_modules():
        if (cause := _cause(name, module)) is not None:
            regions[name] = cause
            _put_on_module(ranges, name, module)
    _wrap(ranges, run.model, "compute_language_model_loss", functools.partial(_in_range, _LOSS))
    _wrap(ranges, run.timers, "data", lambda data: lambda batches: data(_each_in_range(batches)))
    _wrap(ranges, run.engine, "step", functools.partial(_in_range, _OPTIMIZER))
    _wrap(ranges, engines, "_finish_gradients", functools.partial(_in_range, _OPTIMIZER))
    _wrap(ranges, dist.Work, "wait", functools.partial(_in_range, WAITING))
    return regions


def _cause(name: str, module: nn.Module) -> Cause | None:
    """What a module's time is charged to; None where it is its outer module's matter."""
    if isinstance(module, MLP):
        return Cause.STRUCTURED_FFN if isinstance(module, StructuredMLP) else Cause.DENSE_FFN
    if isinstance(module, SelfAttention):
        return Cause.ATTENTION
    if name == "output_layer":
        return Cause.OUTPUT_LAYER
    leaf = name.rpartition(".")[2]
    return Cause.REST if leaf.isdecimal() or leaf.endswith("layernorm") or name == "embedding" else None


def _put_on_module(ranges: contextlib.ExitStack, name: str, module: nn.Module) -> None:
    opened: list[Any] = []  # a checkpointed layer runs again in its backward pass

    def enter(*_: Any) -> None:
        opened.append(record_function(name))
        opened[-1].__enter__()

    def leave(*_: Any) -> None:
        if opened:
            opened.pop().__exit__(None, None, None)

    ranges.callback(module.register_forward_pre_hook(enter, prepend=True).remove)
    ranges.callback(module.register_forward_hook(leave, always_call=True).remove)


def _wrap(ranges: contextlib.ExitStack, owner: Any, name: str, wrap: Callable[[Any], Any]) -> None:
    """Put ``wrap(owner.name)`` in the place of ``owner.name``; back as it was at the end."""
    own = vars(owner).get(name)
    setattr(owner, name, wrap(getattr(owner, name)))
    if own is None:
        ranges.callback(delattr, owner, name)
    else:
        ranges.callback(setattr, owner, name, own)


def _in_range(range_name: str, function: Callable[..., T]) -> Callable[..., T]:
    @functools.wraps(function)
    def wrapper(*arguments: Any, **options: Any) -> T:
        with record_function(range_name):
            return function(*arguments, **options)

    return wrapper


def _each_in_range(batches: Iterator[T]) -> Iterator[T]:
    while True:
        with record_function(_DATA):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch
