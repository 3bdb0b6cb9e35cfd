"""Where rank 0 reports to: metrics, evaluations, events, trackers, progress and estimate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sffn_dist.inference.evaluation import EvaluationResult
from sffn_dist.parallel.topology import Topology
from sffn_dist.spec import counts
from sffn_dist.spec import schedule as schedules
from sffn_dist.spec.config import Config
from sffn_dist.spec.device_peaks import peak_flops
from sffn_dist.telemetry.events import EventLog
from sffn_dist.telemetry.metrics import MetricsLog
from sffn_dist.telemetry.progress import Estimate, Progress
from sffn_dist.telemetry.trackers import Trackers

# bytes a second that a save takes of training, written at once or copied; until one was timed
DISK_RATE, COPY_RATE = 500e6, 5e9


class Reports:
    """Opened at a step, and again at an earlier one by a rollback (:meth:`rewind`)."""

    def __init__(
        self,
        config: Config,
        precision: str,
        topology: Topology,
        trackers: Trackers,
        step: int,
        restore: Callable[[], None] = lambda: None,
    ):
        self._restore = restore  # of run.dir, where it was removed
        self.trackers = trackers
        self.flops_per_step = counts.flops_per_token(config) * config.tokens_per_step  # without the guide
        # when every guide is computed
        self.guide_flops_per_step = counts.guide_flops_per_token(config) * config.tokens_per_step
        self.events = EventLog(Path(config.run.dir) / "events.jsonl", on_removed=restore)
        self._config, self._precision, self._topology = config, precision, topology
        self._open(step)

    def _open(self, step: int) -> None:
        config, topology, run_dir = self._config, self._topology, Path(self._config.run.dir)
        peak = None
        if config.logging.peak_tflops is not None:
            peak = config.logging.peak_tflops * 1e12
        elif topology.device.type == "cuda":
            peak = peak_flops(torch.cuda.get_device_name(), self._precision)
        total = schedules.build_schedule(config).total_steps
        self.metrics = MetricsLog(run_dir / "metrics.jsonl", step, self._restore)
        # a row's step counts the steps taken: the one of a resumed step stands, the last one is written anew
        self.evaluations = MetricsLog(run_dir / "evaluations.jsonl", step + (step < total), self._restore)
        self.progress = Progress(
            total,
            step,
            flops_per_step=self.flops_per_step,
            peak_flops=peak * topology.world_size if peak else None,
            enabled=config.logging.progress,
        )
        self.estimate = _estimate(config, topology, step, self.guide_flops_per_step / self.flops_per_step)

    def rewind(self, step: int) -> None:
        """Metrics go on from an earlier step, whatever they held beyond; the events stay."""
        self.close()
        self.trackers.rewind(step)
        self._open(step)

    def event(self, event: str, step: int, text: str, **facts: Any) -> None:
        """A line for the reader, a row of events.jsonl, word to the trackers."""
        self.progress.note(text)
        self.trackers.event(self.events.write(event, step, message=text, **facts))

    def evaluated(self, step: int, result: EvaluationResult, seconds: float) -> None:
        """One row of evaluations.jsonl, the progress line, the trackers; ``step`` counts the steps taken."""
        figures = {
            "heldout_loss": result.loss,
            "perplexity": result.perplexity,
            "bits_per_byte": result.bits_per_byte,
            "bits_per_byte_estimated": result.bytes_estimated,
        }
        self.estimate.observe("evaluation", seconds)
        self.evaluations.write({"step": step, **figures})
        self.trackers.log(figures, step - 1)
        self.progress.evaluated(result.loss)

    def close(self) -> None:
        """End the progress line and close the logs; the trackers finish with the summary."""
        self.progress.close()
        self.metrics.close()
        self.evaluations.close()


def _estimate(config: Config, topology: Topology, step: int, guide_cost: float) -> Estimate:
    """``guide_cost``: what all guides together add to a step, in units of one without them."""
    run_schedule = schedules.build_schedule(config)
    # a forward pass is a third of a step; a sampled token reads prompt + tokens positions of one
    # sequence (inference/generation.py pads to them)
    one_sequence = 1 / 3 / config.train.global_batch_size
    sampled = config.sample.tokens**2 / config.model.sequence
    # bytes: fp32 weight and two moments
    saved = 12 * counts.parameters_per_rank(config, guide=False) * topology.tensor_parallel_size
    return Estimate(
        run_schedule.total_steps,
        step,
        {"evaluation": config.evaluation_sequences * one_sequence, "sample": sampled * one_sequence},
        costs=[
            1.0 + guide_cost * run_schedule.expected_drawn_fraction(at)
            for at in range(run_schedule.total_steps)
        ],
        assumed={"checkpoint": saved / (COPY_RATE if config.checkpoint.asynchronous else DISK_RATE)},
    )
