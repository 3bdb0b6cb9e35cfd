"""The loop: step -> batches, guide, optimiser, metrics, evaluation, checkpoint."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from sffn_dist import model as models
from sffn_dist import schedule as schedules
from sffn_dist import shapes
from sffn_dist.checkpoint import store
from sffn_dist.config import Config
from sffn_dist.data.batches import Batches
from sffn_dist.inference.evaluation import Evaluation, evaluate
from sffn_dist.parallel.topology import Topology
from sffn_dist.schedule import Now, Schedule
from sffn_dist.telemetry.metrics import MetricsLog
from sffn_dist.telemetry.peak import measured_flops, peak_flops
from sffn_dist.telemetry.progress import Estimate, Progress, format_duration
from sffn_dist.telemetry.trackers import Trackers
from sffn_dist.training import engine as engines

DISK_RATE = 500e6  # bytes a second, until a checkpoint was timed
EARLY_STEPS = 3  # after so many steps of a process the estimate of the whole run is printed


@dataclass
class Heldout:
    """What evaluations need: (n, S+1) windows and the bytes of every token id."""

    windows: NDArray[np.int64]
    token_bytes: NDArray[Any]


@dataclass
class Reports:
    """Where a rank reports to; only rank 0 has these."""

    metrics: MetricsLog
    evaluations: MetricsLog
    trackers: Trackers
    progress: Progress
    estimate: Estimate

    def close(self) -> None:
        """End the progress line and close the logs; the trackers finish with the summary."""
        self.progress.close()
        self.metrics.close()
        self.evaluations.close()


@dataclass
class Run:
    """All of a run on this rank; ``step`` is the next step to take."""

    config: Config
    precision: str
    schedule: Schedule
    topology: Topology
    engine: engines.Engine
    batches: Batches
    heldout: Heldout
    data_fingerprint: str
    step: int
    reports: Reports | None = None
    evaluated: dict[int, Evaluation] = field(default_factory=dict)

    @property
    def model(self) -> Any:
        return self.engine.module

    @property
    def dir(self) -> Path:
        return Path(self.config.run.dir)


def open_reports(config: Config, precision: str, topology: Topology, trackers: Trackers, step: int) -> Reports:
    """Metrics, progress and estimate of rank 0."""
    tokens = config.train.global_batch_size * config.model.sequence
    peak = peak_flops(torch.cuda.get_device_name(), precision) if topology.device.type == "cuda" else None
    # a forward pass is a third of a step; a sampled token reads up to prompt + tokens positions of one sequence
    one_sequence = 1 / 3 / config.train.global_batch_size
    sampled = config.sample.tokens**2 / 2 / config.model.sequence
    extra = {"evaluation": config.evaluation_sequences * one_sequence, "sample": sampled * one_sequence}
    saved = 12 * shapes.parameters_per_rank(config) * topology.tensor  # bytes: fp32 weight and two moments
    return Reports(
        metrics=MetricsLog(Path(config.run.dir) / "metrics.jsonl", step),
        # a row's step counts the steps taken: the one of a resumed step stands, the last one is written anew
        evaluations=MetricsLog(Path(config.run.dir) / "evaluations.jsonl", step + (step < config.train.steps)),
        trackers=trackers,
        progress=Progress(
            config.train.steps,
            step,
            flops_per_step=shapes.flops_per_token(config) * tokens,
            peak_flops=peak * topology.world if peak else None,
            enabled=config.logging.progress,
        ),
        estimate=Estimate(config.train.steps, step, extra, costs=_costs(config), assumed={"checkpoint": saved / DISK_RATE}),
    )


def _costs(config: Config) -> list[float]:
    """FLOPs of each step in units of an unguided one."""
    clock, more = schedules.of(config), shapes.guide_flops_per_token(config) / shapes.flops_per_token(config)
    return [1.0 + more * clock.expected_drawn_share(step) for step in range(clock.total_steps)]


def train(run: Run) -> None:
    """Take every step that is left."""
    config, first = run.config, run.step
    saved: Path | None = None
    announce_bound(run)
    for step in range(first, run.schedule.total_steps):
        now = run.schedule.at(step)
        drawn = models.set_guide(run.model, run.schedule, now)
        engines.set_learning_rate(run.engine, config.train.learning_rate * now.learning_rate_factor)
        started = time.perf_counter()
        batches = _micro_batches(run, now, announce=step == first)
        loss, norm = engines.train_step(run.engine, _loss(run), batches, config.train.clip)
        loss = _mean_over_data(loss, run.topology)
        run.step = step + 1
        report_step(
            run,
            now,
            loss,
            norm,
            drawn,
            time.perf_counter() - started,
            announce=run.step == min(first + EARLY_STEPS, run.schedule.total_steps),
        )
        if due(run.step, config.evaluation.interval, run.schedule.total_steps):
            evaluate_now(run)
        if due(run.step, config.checkpoint.interval, run.schedule.total_steps):
            saved = save(run)
    if run.step > first and saved is None:
        saved = save(run)  # the last save is worth a second try
    if saved is None and run.step > first:
        raise LostWeightsError(f"the finished run's weights could not be saved in {run.dir}; see the warnings above")


class LostWeightsError(RuntimeError):
    """Training is over and its result is not on disk."""


def due(step: int, interval: int, total: int) -> bool:
    """True after the last step and after every ``interval`` ones (0: only after the last)."""
    return step == total or (interval > 0 and step % interval == 0)


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
                announce_estimate(run, "from the first micro-batch of the first step, which includes the warm-up")
        yield torch.from_numpy(np.ascontiguousarray(batch)).to(topology.device)


def _mean_over_data(loss: float, topology: Topology) -> float:
    if topology.data == 1:
        return loss
    total = torch.tensor(loss, device=topology.device, dtype=torch.float32)
    dist.all_reduce(total, group=topology.data_group)
    return float(total) / topology.data


# --------------------------------------------------------------------------------------------------------------- reporting


def report_step(run: Run, now: Now, loss: float, norm: float, drawn: int, seconds: float, announce: bool) -> None:
    """One line of metrics, the progress bar, the trackers."""
    if run.reports is None:
        return
    config, reports = run.config, run.reports
    tokens = config.train.global_batch_size * config.model.sequence
    linears = sum(1 for _ in models.structured_linears(run.model))
    share = drawn / linears if linears else 0.0
    flops = tokens * (shapes.flops_per_token(config) + share * shapes.guide_flops_per_token(config))
    row = {
        "step": now.step,
        "tokens": (now.step + 1) * tokens,
        "loss": loss,
        "alpha": now.alpha,
        "lr": config.train.learning_rate * now.learning_rate_factor,
        "grad_norm": norm,
        "tokens_per_s": tokens / seconds,
        "seconds": seconds,
        "phase": now.phase,
        "guided_share": share,
        "data_step": now.data_step,
        "flops": flops,
    }
    reports.estimate.observe("step", seconds, step=now.step)
    reports.metrics.write(row)
    reports.trackers.log(row, now.step)
    reports.progress.step(row, remaining_seconds(run))
    if announce and run.step < run.schedule.total_steps:
        announce_estimate(run, f"from {run.step} steps" if run.step > 1 else "from the first step")


def remaining_seconds(run: Run) -> float | None:
    """Seconds to the end, evaluations, checkpoints and the sample included."""
    assert run.reports
    config, total = run.config, run.schedule.total_steps

    def left(interval: int) -> int:
        """Steps after this one at which something of this interval is due."""
        if run.step >= total:
            return 0
        return 1 if not interval else total // interval - run.step // interval + (total % interval > 0)

    return run.reports.estimate.remaining(
        run.step, left(config.evaluation.interval), left(config.checkpoint.interval), int(config.sample.tokens > 0)
    )


def announce_bound(run: Run) -> None:
    """Before the first step of a long run: what its matrix products alone will take."""
    if run.reports is None or run.step >= run.schedule.total_steps:
        return
    config = run.config
    rate = measured_flops(run.topology.device, run.precision) * run.topology.world
    flops = shapes.flops_per_token(config) * config.train.global_batch_size * config.model.sequence
    seconds = flops * sum(_costs(config)[run.step :]) / rate
    if seconds > 600:
        run.reports.progress.note(
            f"estimated time: at least {format_duration(seconds)}, matrix products alone at {rate / 1e12:.3g} TFLOP/s; "
            "a better estimate follows once a few steps are known"
        )


def announce_estimate(run: Run, source: str) -> None:
    """Tell the time left by the steps measured so far; ``source`` says what they were."""
    assert run.reports
    seconds = remaining_seconds(run)
    if seconds is not None:
        left = run.schedule.total_steps - run.step
        run.reports.progress.note(
            f"estimated time: {format_duration(seconds)} for {left} steps, evaluations, checkpoints and sample ({source})"
        )


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


def save(run: Run) -> Path | None:
    """A checkpoint; a failed one (disk full, folder gone) is reported and does not stop training."""
    started = time.perf_counter()
    fragments = store.owned(engines.fragments(run.engine), run.config, run.topology)
    progress = store.Progress(run.step, engines.step_count(run.engine), run.data_fingerprint)
    try:
        path = store.save(run.dir, progress, fragments, run.config, run.topology)
    except store.SaveError as error:
        if run.reports:
            run.reports.progress.note(f"warning: {error}; training goes on")
        return None
    if run.topology.main:
        store.prune(run.dir, run.config.checkpoint.keep, path)
    if run.reports:
        run.reports.estimate.observe("checkpoint", time.perf_counter() - started)
    return path
