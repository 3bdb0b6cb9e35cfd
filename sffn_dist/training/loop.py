"""The loop: step -> batches, guide, optimiser, metrics, evaluation, checkpoint."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sffn_dist import model as models
from sffn_dist.checkpoint import writer
from sffn_dist.health import replica_check
from sffn_dist.inference.evaluation import Evaluation, evaluate
from sffn_dist.launch import exit_codes
from sffn_dist.parallel.object_collectives import broadcast_object
from sffn_dist.spec import schedule as schedules
from sffn_dist.spec.schedule import StepSchedule
from sffn_dist.spec.split_table import is_guide
from sffn_dist.training import engine as engines
from sffn_dist.training import engine_state, phases, reporting, rollback
from sffn_dist.training.run import Run
from sffn_dist.training.step_agreement import StepAgreement, agree_on_step


def train(run: Run) -> signal.Signals | None:
    """Take every step that is left, or those until a signal: that one is returned once the state is saved.

    Raises LostWeightsError, DivergedError or ReplicasDifferError, each on every rank.
    """
    config, first, total = run.config, run.step, run.schedule.total_steps
    reporting.announce_bound(run)
    if _evaluation_missed(run):
        evaluate_now(run)
    while run.step < total:
        stop = pass_over(run) if run.step in run.bad_steps.passed else take_step(run, taken=run.step - first)
        if run.bad_steps.needs_rollback:
            rollback.roll_back(run)
            continue
        phases.enter(run)
        if schedules.due(run.step, config.evaluation.interval, total) and not stop:
            evaluate_now(run)
        run.save_pending |= schedules.due(run.step, config.checkpoint.interval, total)
        saves = stop or (run.save_pending and (run.bad_steps.can_save or run.step == total))
        every = config.guards.replicas_interval
        if every and (saves or run.step % every == 0):  # no checkpoint of replicas that differ
            replica_check.check_replicas(run.model, engine_state.separate_masters(run.engine), config, run.topology)
        if saves:
            save(run)
        _tell_of_saves(run)
        if stop:
            return stopped(run, stop)
    if run.step > first and not finished_save(run):
        save(run)  # the last save is worth a second try
        if not finished_save(run):
            raise LostWeightsError(f"the finished run's weights could not be saved in {run.dir}; see the warnings above")
    return None


def _evaluation_missed(run: Run) -> bool:
    """True where the run was stopped by a signal when an evaluation was due: it is made up for at the next start."""
    due = 0 < run.step < run.schedule.total_steps
    if not (due and schedules.due(run.step, run.config.evaluation.interval, run.schedule.total_steps)):
        return False
    return bool(broadcast_object(run.reports is not None and run.reports.evaluations.last != run.step))


def take_step(run: Run, taken: int) -> signal.Signals | None:
    """One step: batches, guide, optimiser, metrics; skipped where its loss or gradient forbids it. ``taken``: steps of this start."""
    config, now, started = run.config, run.schedule.at(run.step), time.perf_counter()
    drawn = models.set_guide(run.model, run.schedule, now)
    engines.set_learning_rate(run.engine, config.train.learning_rate * now.learning_rate_factor)
    agreed: list[StepAgreement] = []

    def allow(loss: float) -> bool:
        with run.recorder.waiting():
            agreed.append(agree_on_step(loss, run.signals, run.topology, report=run.report_requested()))
        return run.bad_steps.losses.rejection_reason(agreed[0].loss) is None

    run.recorder.begin()
    batches = run.recorder.data(_micro_batches(run, now, announce=taken == 0))
    _, norm = engines.train_step(run.engine, _loss(run), batches, config.train.clip, allow)
    run.recorder.end()
    loss = agreed[0].loss
    reason = run.bad_steps.losses.rejection_reason(loss) or (None if math.isfinite(norm) else f"gradient norm {norm}")
    run.step += 1
    last_early = taken + 1 == min(reporting.EARLY_STEPS, run.schedule.total_steps - now.step + taken)
    reporting.report_step(run, now, loss, norm, drawn, time.perf_counter() - started, skipped=reason, announce=last_early)
    run.bad_steps.note(now.step, reason, loss)
    _report_if_asked(run, agreed[0].report)
    return agreed[0].stop


def _report_if_asked(run: Run, asked: bool) -> None:
    """A report of all ranks; on CUDA after one step more, which waits for the device at each mark."""
    if run.recorder.precise or (asked and run.topology.device.type != "cuda"):
        run.recorder.precise = False
        reporting.report_ranks(run)
    elif asked:
        run.recorder.precise = True


def pass_over(run: Run) -> signal.Signals | None:
    """A step that was bad before the run went back: nothing of it is computed, and no signal agreed on."""
    run.tell("passed over", f"step {run.step}: its batch is passed over")
    run.step += 1
    return None


def stopped(run: Run, stop: signal.Signals) -> signal.Signals:
    """The end of a run that a signal stopped; its state is being saved."""
    saved = finished_save(run)
    if not saved:
        raise LostWeightsError(
            f"{stop.name}: the state after step {run.step} could not be saved in {run.dir}; see the warnings above"
        )
    run.tell(
        "stopped",
        f"stopped by {stop.name} after step {run.step} of {run.schedule.total_steps}; saved in {saved}",
        signal=stop.name,
    )
    return stop


class LostWeightsError(RuntimeError):
    """Training is over and its result is not on disk."""

    exit_code = exit_codes.FAILED


def _loss(run: Run) -> Any:
    def loss(batch: Tensor) -> Tensor:
        run.watch.tick("training", run.step)
        mean = models.token_losses(run.engine, batch[:, :-1].contiguous(), batch[:, 1:].contiguous()).mean()
        run.recorder.forwarded()
        return mean

    return loss


def _micro_batches(run: Run, now: StepSchedule, announce: bool) -> Iterator[Tensor]:
    """This rank's micro-batches (micro_batch, S+1) of a step; the first ones of a long step give the first estimate."""
    topology, micro = run.topology, run.config.train.micro_batch_size
    batches = run.batches.at(now.data_step, topology.data_rank, topology.data, micro_batch_size=micro)
    started = time.perf_counter()
    for index, batch in enumerate(batches):
        if announce and index == 1 and run.reports:
            seconds = (time.perf_counter() - started) * len(batches)
            if seconds > 30:  # a step of half a minute or more: say so before it is over
                run.reports.estimate.observe("step", seconds, step=now.step)
                reporting.announce_estimate(run, "from the first micro-batch of the first step, which includes the warm-up")
        yield torch.from_numpy(np.ascontiguousarray(batch)).to(topology.device)


def evaluate_now(run: Run) -> Evaluation:
    """Held-out loss: of the mix that is trained while guided, of the structure alone at the end."""
    if run.step in run.evaluated:
        return run.evaluated[run.step]
    started = time.perf_counter()
    if run.step == run.schedule.total_steps:
        models.unset_guide(run.model)
    else:
        models.mix_guide(run.model, run.schedule.alpha(run.step))
    result = evaluate(
        run.model,
        run.watch.with_progress(models.token_losses, "evaluation", run.step),
        run.heldout.windows,
        run.heldout.token_bytes,
        run.config.train.micro_batch_size,
        run.topology,
    )
    run.evaluated[run.step] = result
    if run.reports:
        row = {
            "step": run.step,
            "heldout_loss": result.loss,
            "perplexity": result.perplexity,
            "bits_per_byte": result.bits_per_byte,
        }
        run.reports.estimate.observe("evaluation", time.perf_counter() - started)
        run.reports.evaluations.write(row)
        run.reports.trackers.log({key: value for key, value in row.items() if key != "step"}, run.step - 1)
        run.reports.progress.evaluated(result.loss)
    return result


def save(run: Run) -> None:
    """Begin a checkpoint of ``run.step``; a failed one (disk full, folder gone) is reported and does not stop training."""
    started = time.perf_counter()
    steps, guide_steps = engine_state.step_counts(run.engine)
    guided = run.schedule.guided(run.step)
    held = (fragment for fragment in engine_state.fragments(run.engine) if guided or not is_guide(fragment.name))
    fragments = writer.owned_fragments(held, run.config, run.topology)
    position = writer.Position(
        run.step, steps, guide_steps if guided else None, run.data_fingerprint, tuple(run.bad_steps.losses.recent)
    )
    _await_save(run)  # of the one before, which must not seem a hang
    run.saver.save(position, fragments)
    run.save_pending = False
    run.bad_steps.saved(run.step)
    if run.reports:
        run.reports.estimate.observe("checkpoint", time.perf_counter() - started)


def finished_save(run: Run) -> Path | None:
    """The checkpoint begun last, once it is written; None if that failed, on every rank."""
    path = _await_save(run)
    _tell_of_saves(run)
    return path


def _tell_of_saves(run: Run) -> None:
    for problem in run.saver.news():
        if run.reports:
            run.reports.progress.note(f"warning: {problem}; training goes on")


def _await_save(run: Run) -> Path | None:
    """Let a save end, however slow the disk is."""
    while run.saver.writing:
        run.watch.tick("saving", run.step)
        run.saver.wait(5.0)
    return run.saver.wait()
