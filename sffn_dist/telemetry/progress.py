"""What a run prints while it runs, and how long it still takes.

:class:`Progress` draws a bar on a terminal and prints a plain line now and then anywhere else (log file, CI,
batch system). :class:`Estimate` turns measured durations into remaining seconds. Only rank 0 uses them.
"""

from __future__ import annotations

import itertools
import math
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal, TextIO, get_args

Kind = Literal["step", "evaluation", "checkpoint", "sample"]


def format_duration(seconds: float) -> str:
    """'45 s', '3 min 20 s', '2 h 05 min', '3 days 4 h', '41 days'; 'unknown' for what is not finite."""
    if not math.isfinite(seconds):
        return "unknown"
    whole = round(max(seconds, 0.0))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(whole / 60)
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(whole / 3600)
    if hours < 10 * 24:
        return f"{hours // 24} days {hours % 24} h"
    return f"{round(hours / 24):,} days"


class Estimate:
    """Remaining seconds of a run, from measured durations.

    A step counts with the median of the newest ``window`` ones; the first of a process (compilation, cold
    caches) only while it is the only one. Evaluations, checkpoints and samples count with the median of those
    seen; before one was seen, ``extra`` states how long it takes in units of a step, e.g. ``{"evaluation":
    0.3}`` (a forward pass is a third of a step); a kind named in neither costs nothing. ``assumed`` does the
    same in seconds. ``costs``, if given, holds the relative cost of each step of the run: guided ones cost
    more.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        extra: Mapping[str, float] | None = None,
        window: int = 50,
        costs: Sequence[float] | None = None,
        assumed: Mapping[str, float] | None = None,
    ):
        self.total_steps = total_steps
        self.start_step = start_step
        self._costs = [1.0] * total_steps if costs is None else list(costs)
        # _left[i]: cost of steps i.. together
        self._left = list(itertools.accumulate(reversed(self._costs), initial=0.0))[::-1]
        self._extra, self._assumed = dict(extra or {}), dict(assumed or {})
        unknown = (set(self._extra) | set(self._assumed)) - set(get_args(Kind))
        if unknown:
            raise ValueError(f"extra or assumed names {sorted(unknown)}: must be among {get_args(Kind)}")
        self._first_step: float | None = None
        self._seen: dict[str, deque[float]] = {kind: deque(maxlen=window) for kind in get_args(Kind)}

    def observe(self, kind: Kind, seconds: float, count: int = 1, step: int | None = None) -> None:
        """``count`` events of a kind took ``seconds`` together.

        Negative and non-finite durations are left out.

        ``step`` is the step it was, so that its own cost is taken into account.
        """
        duration = seconds / count / (self._costs[step] if step is not None else 1.0)
        if not math.isfinite(duration) or duration < 0:
            return
        if kind == "step" and self._first_step is None:
            self._first_step = duration
        else:
            self._seen[kind].append(duration)

    def step_seconds(self) -> float | None:
        """Seconds of a step of cost 1; None until one was observed."""
        return statistics.median(self._seen["step"]) if self._seen["step"] else self._first_step

    def cost_left(self, step: int) -> float:
        """Cost of the steps from ``step`` on, in units of a step of cost 1."""
        return self._left[min(max(step, self.start_step), self.total_steps)]

    def remaining(
        self,
        step: int,
        remaining_evaluations: int = 0,
        remaining_checkpoints: int = 0,
        remaining_samples: int = 0,
    ) -> float | None:
        """Seconds left when ``step`` steps of the run are done (counted from its beginning).

        None until a step was observed.
        """
        step_time = self.step_seconds()
        if step_time is None:
            return None
        left = self.cost_left(step) * step_time
        counts = {
            "evaluation": remaining_evaluations,
            "checkpoint": remaining_checkpoints,
            "sample": remaining_samples,
        }
        for kind, count in counts.items():
            durations = self._seen[kind]
            assumed = self._extra.get(kind, 0.0) * step_time + self._assumed.get(kind, 0.0)
            left += count * (statistics.median(durations) if durations else assumed)
        return left


class Progress:
    """The progress of a run with ``total`` steps of which ``start`` are done.

    One call of :meth:`step` for each further one.

    ``flops_per_step``: floating-point operations of a step over all ranks; ``peak_flops``: what all devices
    together can do in a second, None where unknown (then no MFU is shown). Not ``enabled``: silent. A stream
    that cannot be written any more never raises.
    """

    FIRST = 3  # steps that always get a plain line
    SECONDS = 10.0  # between plain lines afterwards

    def __init__(
        self,
        total: int,
        start: int,
        flops_per_step: float,
        peak_flops: float | None = None,
        enabled: bool = True,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.total, self.start, self.done = total, start, start
        self._flops, self._peak = flops_per_step, peak_flops
        self._enabled = enabled
        self._stream = stream if stream is not None else sys.stderr
        self._clock = clock
        self._before = self._printed = clock()
        self._heldout: float | None = None
        self._estimate = Estimate(total, start)
        self._bar: Any = self._make_bar() if enabled and _is_terminal(self._stream) else None

    def step(self, row: Mapping[str, Any], remaining: float | None = None) -> None:
        """Show one finished step.

        Of the row are shown, where present: loss, alpha, lr, grad_norm, tokens_per_s, heldout_loss, tflops,
        mfu. ``seconds`` is what the step took (else the time since the last call), ``flops`` its operations
        where they differ from the others'. ``remaining``: seconds to the end of the run (else from the steps
        alone).
        """
        now = self._clock()
        seconds = row["seconds"] if "seconds" in row else now - self._before
        self._before = now
        # the batches of some steps may have been skipped
        before, self.done = self.done, row.get("step", self.done) + 1
        self._estimate.observe("step", seconds)
        if row.get("heldout_loss") is not None:
            self._heldout = row["heldout_loss"]
        if not self._enabled:
            return
        if remaining is None:
            remaining = self._estimate.remaining(self.done)
        text = "  ".join(self._parts(row, seconds, remaining))
        if self._bar is not None:
            self._try(self._advance, text, self.done - before)
        elif (
            self.done - self.start <= self.FIRST
            or self.done >= self.total
            or now - self._printed >= self.SECONDS
        ):
            self._printed = now
            self._print(f"step {self.done}/{self.total}  {text}")

    def evaluated(self, heldout_loss: float) -> None:
        """Show a held-out loss now and beside every later step."""
        self._heldout = heldout_loss
        self.note(f"after step {self.done}: held-out loss {heldout_loss:.4f}")

    def note(self, text: str) -> None:
        """A line of its own, above the bar; also where the progress itself is not shown."""
        # what a note reports was no part of a step
        self._before = self._clock() if self.done > self.start else self._before
        if self._bar is not None:
            self._try(lambda: self._bar.write(text, file=self._stream))
        else:
            self._print(text)

    def close(self) -> None:
        """Leave the bar as it stands and go to a new line."""
        if self._bar is not None:
            self._try(self._bar.close)
            self._bar = None
        self._enabled = False

    def _parts(self, row: Mapping[str, Any], seconds: float, remaining: float | None) -> list[str]:
        formats = (
            ("loss", "loss", ".4f"),
            ("alpha", "alpha", ".3f"),
            ("lr", "lr", ".2e"),
            ("grad_norm", "grad norm", ".3g"),
        )
        parts = [f"{name} {row[key]:{form}}" for key, name, form in formats if row.get(key) is not None]
        if row.get("tokens_per_s") is not None:
            parts.append(f"{row['tokens_per_s']:,.0f} tokens/s")
        rate = row.get("flops", self._flops) / seconds if seconds > 0 else 0.0
        tflops = row.get("tflops", rate / 1e12)
        if tflops:
            parts.append(f"{tflops:.3g} TFLOP/s")
        mfu = row.get("mfu", rate / self._peak if self._peak else None)
        if mfu:
            parts.append(f"MFU {mfu:.1%}")
        if self._heldout is not None:
            parts.append(f"held-out {self._heldout:.4f}")
        if remaining is not None and self.done < self.total:
            parts.append(f"{format_duration(remaining)} left")
        return parts

    def _make_bar(self) -> Any:
        from tqdm import tqdm

        form = "{n_fmt}/{total_fmt} {percentage:3.0f}%|{bar:10}| {elapsed}{postfix}"
        return tqdm(
            total=self.total,
            initial=self.start,
            file=self._stream,
            bar_format=form,
            dynamic_ncols=True,
            mininterval=0.2,
        )

    def _advance(self, text: str, steps: int) -> None:
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(steps)
        if self.done >= self.total:
            self._bar.refresh()

    def _print(self, text: str) -> None:
        line = text.replace("\r\n", "\n").replace("\r", "\n") + "\n"
        self._try(lambda: (self._stream.write(line), self._stream.flush()))

    def _try(self, show: Callable[..., object], *arguments: object) -> None:
        """A closed terminal or a full disk under the log must not stop a run."""
        with suppress(OSError, ValueError):
            show(*arguments)


def _is_terminal(stream: TextIO) -> bool:
    try:
        return stream.isatty()
    except (AttributeError, ValueError):
        return False
