"""Is a step's loss one to learn from? A rule on the losses of the steps before it. Standard library only.

With m the median of the last N accepted losses and MAD the median of their distances to it, a loss is a spike
if

    loss - m > max(d * 1.4826 * MAD, margin)

1.4826 MAD estimates the standard deviation of normal noise, and neither is moved by a few outliers. d =
guards.spike_deviations, N = guards.spike_window, margin = guards.spike_margin in nats: where the noise is
small, ten deviations are no event.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from statistics import median

from sffn_dist.spec.config import Guards

MIN_LOSSES = 16  # losses, below which nothing is a spike yet


class LossHistory:
    """The last accepted losses; equal on all ranks, and kept in checkpoints."""

    def __init__(self, guards: Guards, recent: Iterable[float] = ()):
        self._guards = guards
        self.recent: deque[float] = deque(recent, maxlen=guards.spike_window)

    def skip_reason(self, loss: float) -> str | None:
        """Why no step should be taken on this loss; None if one should. O(N log N) in the window."""
        if not math.isfinite(loss):
            return f"loss {loss}"
        if not self._guards.spike_deviations or len(self.recent) < min(MIN_LOSSES, self._guards.spike_window):
            return None
        middle = median(self.recent)
        deviation = 1.4826 * median(abs(value - middle) for value in self.recent)
        if loss - middle <= max(self._guards.spike_deviations * deviation, self._guards.spike_margin):
            return None
        return (
            f"loss {loss:.4f}: the last {len(self.recent)} have median {middle:.4f} and deviation "
            f"{deviation:.4f}; "
            f"guards.spike_deviations = {self._guards.spike_deviations:g}, guards.spike_margin = "
            f"{self._guards.spike_margin:g}"
        )

    def accept(self, loss: float) -> None:
        """A step was taken on this loss."""
        self.recent.append(loss)
