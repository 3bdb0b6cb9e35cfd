"""What rank 0 tells of a run while it trains: metrics, progress, trackers, and how long it still takes."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from sffn_dist import model as models
from sffn_dist.checkpoint import writer
from sffn_dist.checkpoint.manifest import checkpoints
from sffn_dist.health import preflight, stragglers
from sffn_dist.launch import run_identity
from sffn_dist.parallel.topology import Topology
from sffn_dist.spec import counts
from sffn_dist.spec import schedule as schedules
from sffn_dist.spec.config import Config, ConfigError, flatten
from sffn_dist.spec.plan import checkpoint_bytes
from sffn_dist.spec.schedule import StepSchedule
from sffn_dist.telemetry.events import EventLog
from sffn_dist.telemetry.metrics import MetricsLog
from sffn_dist.telemetry.peak import measured_flops, peak_flops
from sffn_dist.telemetry.progress import Estimate, Progress, format_duration
from sffn_dist.telemetry.trackers import Trackers, open_trackers
from sffn_dist.training.run import Reports, Run

DISK_RATE, COPY_RATE = (
    500e6,
    5e9,
)  # bytes a second that a save takes of training, written at once or copied; until one was timed
EARLY_STEPS = 3  # after so many steps of a process the estimate of the whole run is printed


def begin(run: Run, continued: Path | None, tried: preflight.PreflightReport) -> None:
    """Rank 0 takes run.dir in hand: leftovers out, the run's record and logs in; raises ConfigError where it cannot be written.

    ``tried``: what the pre-flight found.
    """
    config = run.config
    try:
        writer.remove_leftovers(run.dir)
        run_identity.write_record(config, run.data_fingerprint)
        told = run.step == run.schedule.total_steps and (run.dir / "summary.json").exists()
        trackers = Trackers() if told else open_trackers(config.logging, run.dir, flatten(config), run.step)
        run.reports = open_reports(config, run.precision, run.topology, trackers, run.step)
    except OSError as error:
        raise ConfigError([f"run.dir = {config.run.dir!r}: cannot be written: {error}"]) from None
    _warn_of_room(run)
    if tried.trials or tried.warnings:
        head, *_ = tried.text().split("\n", 1)
        run.tell("pre-flight", "\n".join([head, *(f"warning: {warning}" for warning in tried.warnings)]), **tried.row())
    if continued:
        run.tell("continued", f"continuing at step {run.step} of {run.schedule.total_steps} from {continued}")


def begin_again(run: Run) -> None:
    """After a return to an earlier step: its metrics go on from there, whatever they held beyond."""
    if run.reports is None:
        return
    trackers = run.reports.trackers
    run.reports.close()
    trackers.rewind(run.step)
    run.reports = open_reports(run.config, run.precision, run.topology, trackers, run.step)


def _warn_of_room(run: Run) -> None:
    """Before the first step: a save that finds no room would be lost, hours later."""
    assert run.reports
    kept = run.config.checkpoint.keep + 1 - len(checkpoints(run.dir))  # the one being written comes on top
    size = checkpoint_bytes(run.config, guide=run.schedule.guided_steps > 0)
    free = shutil.disk_usage(run.dir).free
    if free < kept * size:
        run.reports.progress.note(
            f"warning: run.dir = {run.config.run.dir!r}: {free / 1e9:.3g} GB free, checkpoints will need {kept * size / 1e9:.3g} GB more "
            f"(checkpoint.keep = {run.config.checkpoint.keep}, {size / 1e9:.3g} GB each)"
        )


def open_reports(config: Config, precision: str, topology: Topology, trackers: Trackers, step: int) -> Reports:
    """Metrics, progress and estimate of rank 0."""
    flops = counts.flops_per_token(config) * config.tokens_per_step
    guide_flops = counts.guide_flops_per_token(config) * config.tokens_per_step
    peak = peak_flops(torch.cuda.get_device_name(), precision) if topology.device.type == "cuda" else None
    # a forward pass is a third of a step; a sampled token reads up to prompt + tokens positions of one sequence
    one_sequence = 1 / 3 / config.train.global_batch_size
    sampled = config.sample.tokens**2 / 2 / config.model.sequence
    extra = {"evaluation": config.evaluation_sequences * one_sequence, "sample": sampled * one_sequence}
    total = schedules.build_schedule(config).total_steps
    saved = 12 * counts.parameters_per_rank(config, guide=False) * topology.tensor  # bytes: fp32 weight and two moments
    return Reports(
        metrics=MetricsLog(Path(config.run.dir) / "metrics.jsonl", step),
        # a row's step counts the steps taken: the one of a resumed step stands, the last one is written anew
        evaluations=MetricsLog(Path(config.run.dir) / "evaluations.jsonl", step + (step < total)),
        trackers=trackers,
        events=EventLog(Path(config.run.dir) / "events.jsonl"),
        progress=Progress(
            total,
            step,
            flops_per_step=flops,
            peak_flops=peak * topology.world if peak else None,
            enabled=config.logging.progress,
        ),
        estimate=Estimate(
            total,
            step,
            extra,
            costs=_costs(config, guide_flops / flops),
            assumed={"checkpoint": saved / (COPY_RATE if config.checkpoint.asynchronous else DISK_RATE)},
        ),
        flops_per_step=flops,
        guide_flops_per_step=guide_flops,
    )


def _costs(config: Config, more: float) -> list[float]:
    """FLOPs of each step in units of an unguided one; ``more`` is what all guides together add to it."""
    clock = schedules.build_schedule(config)
    return [1.0 + more * clock.expected_drawn_fraction(step) for step in range(clock.total_steps)]


def report_step(
    run: Run, now: StepSchedule, loss: float, norm: float, drawn: int, seconds: float, *, skipped: str | None, announce: bool
) -> None:
    """One line of metrics, the progress bar, the trackers; a step that was ``skipped`` is an event too."""
    if run.reports is None:
        return
    config, reports = run.config, run.reports
    tokens = config.tokens_per_step
    linears = sum(1 for _ in models.structured_linears(run.model))
    share = drawn / linears if linears else 0.0
    flops = reports.flops_per_step + share * reports.guide_flops_per_step
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
        "skipped": int(skipped is not None),
    }
    reports.estimate.observe("step", seconds, step=now.step)
    reports.metrics.write(row)
    reports.trackers.log(row, now.step)
    reports.progress.step(row, remaining_seconds(run))
    if skipped:
        run.tell("skipped", f"warning: step {now.step}: {skipped}: the optimiser step was skipped", skipped=now.step)
    if announce and run.step < run.schedule.total_steps:
        announce_estimate(run, f"from {run.step} steps" if run.step > 1 else "from the first step")


def report_ranks(run: Run) -> None:
    """How fast each rank is, and which are slow: to the reader and into ranks.jsonl. All ranks must call it."""
    rows = stragglers.report(run.recorder, run.topology, run.config.tokens_per_step, run.precision)
    if run.reports:
        run.reports.progress.note(stragglers.render(rows))
        stragglers.write(run.dir, run.step, rows)


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
    rate = measured_flops(run.topology.device, run.precision) * run.topology.world
    seconds = run.reports.flops_per_step * run.reports.estimate.cost_left(run.step) / rate
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
