"""The loop: step -> batches, guide, optimiser, metrics, evaluation, checkpoint."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from sffn_dist import model as models
from sffn_dist import schedule as schedules
from sffn_dist.checkpoint import store
from sffn_dist.inference.evaluation import Evaluation, evaluate
from sffn_dist.parallel.topology import Topology
from sffn_dist.schedule import Now
from sffn_dist.shapes import is_guide
from sffn_dist.training import engine as engines
from sffn_dist.training import phases, reporting, state
from sffn_dist.training.run import Run


def train(run: Run) -> None:
    """Take every step that is left."""
    config, first = run.config, run.step
    reporting.announce_bound(run)
    for step in range(first, run.schedule.total_steps):
        now = run.schedule.at(step)
        drawn = models.set_guide(run.model, run.schedule, now)
        engines.set_learning_rate(run.engine, config.train.learning_rate * now.learning_rate_factor)
        started = time.perf_counter()
        batches = _micro_batches(run, now, announce=step == first)
        loss, norm = engines.train_step(run.engine, _loss(run), batches, config.train.clip)
        loss = _mean_over_data(loss, run.topology)
        run.step = step + 1
        reporting.report_step(
            run,
            now,
            loss,
            norm,
            drawn,
            time.perf_counter() - started,
            announce=run.step == min(first + reporting.EARLY_STEPS, run.schedule.total_steps),
        )
        phases.enter(run)
        if schedules.due(run.step, config.evaluation.interval, run.schedule.total_steps):
            evaluate_now(run)
        if schedules.due(run.step, config.checkpoint.interval, run.schedule.total_steps):
            save(run)
        _tell_of_saves(run)
    if run.step > first and not finished_save(run):
        save(run)  # the last save is worth a second try
        if not finished_save(run):
            raise LostWeightsError(f"the finished run's weights could not be saved in {run.dir}; see the warnings above")


class LostWeightsError(RuntimeError):
    """Training is over and its result is not on disk."""


def _loss(run: Run) -> Any:
    def loss(batch: Tensor) -> Tensor:
        return models.token_losses(run.engine, batch[:, :-1].contiguous(), batch[:, 1:].contiguous()).mean()

    return loss


def _micro_batches(run: Run, now: Now, announce: bool) -> Iterator[Tensor]:
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


def _mean_over_data(loss: float, topology: Topology) -> float:
    if topology.data == 1:
        return loss
    total = torch.tensor(loss, device=topology.device, dtype=torch.float32)
    dist.all_reduce(total, group=topology.data_group)
    return float(total) / topology.data


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
        models.token_losses,
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
    steps, guide_steps = state.step_counts(run.engine)
    guided = run.schedule.guided(run.step)
    held = (fragment for fragment in state.fragments(run.engine) if guided or not is_guide(fragment.name))
    fragments = store.owned(held, run.config, run.topology)
    position = store.Position(run.step, steps, guide_steps if guided else None, run.data_fingerprint)
    run.saver.save(position, fragments)
    if run.reports:
        run.reports.estimate.observe("checkpoint", time.perf_counter() - started)


def finished_save(run: Run) -> Path | None:
    """The checkpoint begun last, once it is written; None if that failed, on every rank."""
    path = run.saver.wait()
    _tell_of_saves(run)
    return path


def _tell_of_saves(run: Run) -> None:
    for problem in run.saver.news():
        if run.reports:
            run.reports.progress.note(f"warning: {problem}; training goes on")
