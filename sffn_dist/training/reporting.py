"""What rank 0 reports of a run while it trains: each step, each rank's speed, and how long the run still
takes.
"""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

import torch

from sffn_dist import model as models
from sffn_dist.checkpoint import run_folder
from sffn_dist.checkpoint.run_folder import checkpoints
from sffn_dist.data.overview import epochs_line
from sffn_dist.health import stragglers
from sffn_dist.health.preflight import PreflightReport
from sffn_dist.launch import run_identity
from sffn_dist.parallel.topology import Topology
from sffn_dist.spec import changes
from sffn_dist.spec.config import Config, ConfigError
from sffn_dist.spec.config_keys import flatten
from sffn_dist.spec.plan import checkpoint_bytes
from sffn_dist.spec.schedule import StepSchedule, build_schedule, epochs
from sffn_dist.telemetry.peak import measured_flops
from sffn_dist.telemetry.progress import format_duration
from sffn_dist.telemetry.trackers import Trackers, open_trackers
from sffn_dist.training.reports import Reports
from sffn_dist.training.run import TrainingRun
from sffn_dist.training.step_result import StepResult

EARLY_STEPS = 3  # after so many steps of a process the estimate of the whole run is printed


def open_reports(
    config: Config, precision: str, topology: Topology, step: int, data_fingerprint: str
) -> Reports | None:
    """Rank 0 takes run.dir over: leftovers out, the run's record and logs in. None on other ranks.

    Raises ConfigError where run.dir cannot be written.
    """
    if not topology.is_rank_zero:
        return None
    run_dir = Path(config.run.dir)
    try:
        run_folder.remove_leftovers(run_dir)
        run_identity.write_record(config, data_fingerprint)
        finished = step == build_schedule(config).total_steps and (run_dir / "summary.json").exists()
        trackers = Trackers() if finished else open_trackers(config.logging, run_dir, flatten(config), step)
        restore = functools.partial(run_identity.restore_record, config, data_fingerprint)
        return Reports(config, precision, topology, trackers, step, restore)
    except OSError as error:
        raise ConfigError([f"run.dir = {config.run.dir!r}: cannot be written: {error}"]) from None


def report_start(run: TrainingRun, checkpoint: Path | None, preflight: PreflightReport) -> None:
    """What the pre-flight found, and the checkpoint that the run continues from."""
    if run.reports is None:
        return
    run.reports.progress.note(epochs_line(run.config, len(run.batches.tokens)))
    _warn_of_room(run, run.reports)
    if preflight.trials or preflight.warnings:
        head, *_ = preflight.text().split("\n", 1)
        text = "\n".join([head, *(f"warning: {warning}" for warning in preflight.warnings)])
        run.tell("pre-flight", text, **preflight.row())
    for step, text in changes.described(run.config):
        if step == run.step:
            run.tell("changed", text)
    if checkpoint:
        run.tell(
            "continued", f"continuing at step {run.step} of {run.schedule.total_steps} from {checkpoint}"
        )


def _warn_of_room(run: TrainingRun, reports: Reports) -> None:
    """Before the first step: a save that finds no room would be lost, hours later."""
    kept = run.config.checkpoint.keep + 1 - len(checkpoints(run.dir))  # the one being written comes on top
    size = checkpoint_bytes(run.config, guide=run.schedule.guided_steps > 0)
    free = shutil.disk_usage(run.dir).free
    if free < kept * size:
        reports.progress.note(
            f"warning: run.dir = {run.config.run.dir!r}: {free / 1e9:.3g} GB free, checkpoints will need "
            f"{kept * size / 1e9:.3g} GB more (checkpoint.keep = {run.config.checkpoint.keep}, "
            f"{size / 1e9:.3g} GB each)"
        )


def report_step(run: TrainingRun, step_schedule: StepSchedule, result: StepResult) -> None:
    """One line of metrics, the progress bar, the trackers; a skipped step is an event too."""
    if run.reports is None:
        return
    config, reports = run.config, run.reports
    tokens = config.tokens_per_step
    linears = sum(1 for _ in models.structured_linears(run.model))
    guided_fraction = result.guides_computed / linears if linears else 0.0
    row = {
        "step": step_schedule.step,
        "tokens": (step_schedule.step + 1) * tokens,
        "epoch": epochs(config, len(run.batches.tokens), step_schedule.step + 1),
        "loss": result.loss,
        "alpha": step_schedule.alpha,
        "lr": run.schedule.recipe(step_schedule.step, config.train).learning_rate
        * step_schedule.learning_rate_factor,
        "grad_norm": result.grad_norm,
        "tokens_per_s": tokens / result.seconds,
        "seconds": result.seconds,
        "data_wait_ms": 1000.0 * run.timers.data_wait,
        "phase": step_schedule.phase,
        "guided_share": guided_fraction,
        "data_step": step_schedule.data_step,
        "flops": reports.flops_per_step + guided_fraction * reports.guide_flops_per_step,
        "skipped": int(result.skip_reason is not None),
    }
    if run.topology.device.type == "cuda":  # of tensors, the most so far
        row["peak_memory"] = torch.cuda.max_memory_allocated(run.topology.device)
    reports.estimate.observe("step", result.seconds, step=step_schedule.step)
    reports.metrics.write(row)
    reports.trackers.log(row, step_schedule.step)
    reports.progress.step(row, remaining_seconds(run))
    if result.skip_reason:
        text = f"warning: step {step_schedule.step}: {result.skip_reason}: the optimiser step was skipped"
        run.tell("skipped", text, skipped=step_schedule.step)
    steps_of_this_start = run.steps_taken + run.schedule.total_steps - run.step
    if run.steps_taken == min(EARLY_STEPS, steps_of_this_start) and run.step < run.schedule.total_steps:
        announce_estimate(
            run, f"from {run.steps_taken} steps" if run.steps_taken > 1 else "from the first step"
        )


def report_first_micro_batch(run: TrainingRun, step_schedule: StepSchedule, step_seconds: float) -> None:
    """An estimate before the first step is over, where that takes half a minute or more."""
    if run.reports and step_seconds > 30:
        run.reports.estimate.observe("step", step_seconds, step=step_schedule.step)
        announce_estimate(run, "from the first micro-batch of the first step, which includes the warm-up")


def report_ranks(run: TrainingRun) -> None:
    """How fast each rank is, and which are slow: to the reader and into ranks.jsonl.

    All ranks must call it.
    """
    rows = stragglers.report(run.timers, run.topology, run.config.tokens_per_step, run.precision)
    if run.reports:
        run.reports.progress.note(stragglers.render(rows))
        stragglers.write(run.dir, run.step, rows)


def remaining_seconds(run: TrainingRun) -> float | None:
    """Seconds to the end, evaluations, checkpoints and the sample included."""
    assert run.reports
    config, total = run.config, run.schedule.total_steps

    def events_left(interval: int) -> int:
        """Steps after this one at which something of this interval is due."""
        if run.step >= total:
            return 0
        return 1 if not interval else total // interval - run.step // interval + (total % interval > 0)

    return run.reports.estimate.remaining(
        run.step,
        events_left(config.evaluation.interval),
        events_left(config.checkpoint.interval),
        int(config.sample.tokens > 0),
    )


def announce_bound(run: TrainingRun) -> None:
    """Before the first step of a long run: what its matrix products alone will take."""
    if run.reports is None or run.step >= run.schedule.total_steps:
        return
    rate = measured_flops(run.topology.device, run.precision) * run.topology.world_size
    seconds = run.reports.flops_per_step * run.reports.estimate.cost_left(run.step) / rate
    if seconds > 600:
        run.reports.progress.note(
            f"estimated time: at least {format_duration(seconds)}, matrix products alone at "
            f"{rate / 1e12:.3g} TFLOP/s; "
            "a better estimate follows once a few steps are known"
        )


def announce_estimate(run: TrainingRun, source: str) -> None:
    """Report the time left by the steps measured so far; ``source`` states what they were."""
    assert run.reports
    seconds = remaining_seconds(run)
    if seconds is not None:
        left = run.schedule.total_steps - run.step
        run.reports.progress.note(
            f"estimated time: {format_duration(seconds)} for {left} steps, evaluations, checkpoints and "
            f"sample ({source})"
        )
