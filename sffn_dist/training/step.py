"""One training step: its batches, the guide, the optimizer.

Skipped where the loss or a gradient forbids the update.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sffn_dist import model as models
from sffn_dist.data.batches import Batches
from sffn_dist.data.prefetch import Read
from sffn_dist.launch import exit_codes
from sffn_dist.launch.signals import Stop
from sffn_dist.spec.schedule import StepSchedule
from sffn_dist.training import engine as engines
from sffn_dist.training import reporting
from sffn_dist.training.interruption import TRAINING
from sffn_dist.training.run import TrainingRun
from sffn_dist.training.step_agreement import StepAgreement, agree_on_step
from sffn_dist.training.step_result import StepResult


def train_step(run: TrainingRun) -> StepResult:
    """Take step ``run.step`` and report it. All ranks must call it."""
    config, step_schedule, started = run.config, run.schedule.at(run.step), time.perf_counter()
    guides_computed = models.set_guide(run.model, run.schedule, step_schedule)
    recipe = run.schedule.recipe(run.step, config.train)
    engines.set_recipe(run.engine, recipe, recipe.learning_rate * step_schedule.learning_rate_factor)

    def decide(local_loss: float) -> StepAgreement:
        with run.timers.waiting():
            agreement = agree_on_step(
                local_loss,
                run.signals,
                run.topology,
                report=run.report_requested(),
                minutes=(time.monotonic() - run.began) / 60.0,
            )
        run.interruption.forbid()  # the update follows
        return dataclasses.replace(agreement, skip_reason=run.bad_steps.losses.skip_reason(agreement.loss))

    run.timers.begin()
    run.interruption.allow(run.step, TRAINING)
    try:
        batches = run.timers.data(_micro_batches(run, step_schedule))
        engine_step = engines.train_batch(run.engine, _loss(run), batches, recipe.clip, decide)
    finally:
        # an error in it may be that another rank has saved and ended: this one is held, and ends as that did
        run.interruption.forbid()
    run.timers.end()
    agreement, norm = engine_step.decision, engine_step.grad_norm
    skip_reason = agreement.skip_reason
    if skip_reason is None and not math.isfinite(norm):
        skip_reason = f"gradient norm {norm}"
    seconds = time.perf_counter() - started
    result = StepResult(
        step_schedule.step,
        agreement.loss,
        norm,
        guides_computed,
        skip_reason,
        agreement.stop or _planned_stop(run, agreement),
        agreement.report,
        seconds,
    )
    run.step += 1
    run.steps_taken += 1
    reporting.report_step(run, step_schedule, result)
    run.bad_steps.record(step_schedule.step, skip_reason, agreement.loss)
    return result


def _planned_stop(run: TrainingRun, agreement: StepAgreement) -> Stop | None:
    """What train.stop_at_step and train.stop_after_minutes ask for after this step."""
    train, done = run.config.train, run.step + 1
    if done == run.schedule.total_steps:
        return None
    if train.stop_at_step is not None and done >= train.stop_at_step:
        return Stop(f"train.stop_at_step = {train.stop_at_step}", exit_codes.DONE)
    if train.stop_after_minutes is not None and agreement.minutes >= train.stop_after_minutes:
        return Stop(f"train.stop_after_minutes = {train.stop_after_minutes:g}", exit_codes.DONE)
    return None


def skip_excluded_batch(run: TrainingRun) -> StepResult:
    """A step that was bad before a rollback: nothing is computed, and its batch is not used."""
    run.tell("batch skipped", f"step {run.step}: its batch is skipped, the step was bad before a rollback")
    run.step += 1
    return StepResult(run.step - 1)


def _loss(run: TrainingRun) -> Callable[[Tensor], Tensor]:
    def loss(batch: Tensor) -> Tensor:
        run.watchdog.tick("training", run.step)
        mean = models.token_losses(run.engine, batch[:, :-1].contiguous(), batch[:, 1:].contiguous()).mean()
        run.timers.forwarded()
        return mean

    return loss


def _micro_batches(run: TrainingRun, step_schedule: StepSchedule) -> Iterator[Tensor]:
    """This rank's micro-batches (micro_batch, S+1).

    Those of a start's first step give the first estimate of its time.
    """
    tokens = run.prefetch.take(*_reading(run, step_schedule.data_step))
    _read_ahead(run)
    batches = tokens.to(run.topology.device, non_blocking=True)  # one copy for all of them
    started = time.perf_counter()
    for index, batch in enumerate(batches):
        if index == 1 and run.steps_taken == 0:
            reporting.report_first_micro_batch(
                run, step_schedule, (time.perf_counter() - started) * len(batches)
            )
        yield batch


def _reading(run: TrainingRun, data_step: int) -> tuple[tuple[Batches, int], Read]:
    """By what key this rank's batches of a step are read ahead, and how they are read."""
    topology, micro, batches = run.topology, run.config.micro_batch_size, run.batches

    def read() -> NDArray[np.int64]:
        return batches.at(
            data_step, topology.data_parallel_rank, topology.data_parallel_size, micro_batch_size=micro
        )

    return (batches, data_step), read


def _read_ahead(run: TrainingRun) -> None:
    """Begin to read what the step after ``run.step`` will need, as far as is known now."""
    following = (
        step for step in range(run.step + 1, run.schedule.total_steps) if step not in run.bad_steps.excluded
    )
    step = next(following, None)
    if step is not None:
        run.prefetch.start(*_reading(run, run.schedule.at(step).data_step))
