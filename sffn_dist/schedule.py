"""One clock: everything about a step as pure functions of (config, step). Standard library only.

The optimiser's global step is the only state of a run besides weights and moments; resuming is loading those three.

    alpha(step) = (1 + cos(pi * step / guided_steps)) / 2     1 at step 0, 0 from guided_steps on   (paper, section 4)
    lr(step)    = linear warm-up to 1, then a cosine to min_ratio                                  (paper, appendix)
"""

from __future__ import annotations

import hashlib
import math
import struct
from dataclasses import dataclass
from typing import Literal

from sffn_dist.config import Config

Phase = Literal["plain", "guided"]


@dataclass(frozen=True)
class Now:
    """What a step is: its guide weight, phase, learning-rate factor and the step whose data it reads."""

    step: int
    alpha: float
    phase: Phase
    learning_rate_factor: float
    data_step: int


@dataclass(frozen=True)
class Schedule:
    """The run's clock; build it with :func:`of`."""

    total_steps: int
    guided_steps: int
    warmup_steps: int
    min_learning_rate_ratio: float
    stochastic: bool
    seed: int

    def at(self, step: int) -> Now:
        """Raises ValueError outside [0, total_steps)."""
        if not 0 <= step < self.total_steps:
            raise ValueError(f"step {step} is outside the run's 0..{self.total_steps - 1}")
        alpha = self.alpha(step)
        phase: Phase = "guided" if step < self.guided_steps else "plain"
        return Now(step, alpha, phase, self.learning_rate_factor(step), step)

    def alpha(self, step: int) -> float:
        """Weight of the guide; 1 at step 0, 0 from ``guided_steps`` on."""
        if step >= self.guided_steps:
            return 0.0
        return 0.5 * (1.0 + math.cos(math.pi * step / self.guided_steps))

    def guide_weight(self, now: Now, layer: int, linear: int) -> float | None:
        """alpha where this linear computes its guide in this step, None where it does not.

        Stochastic (paper, section 4): with probability alpha the linear uses the mix, still weighted by alpha, else U(V x) alone.
        ``linear`` is 0 for the first and 1 for the second projection of the feed-forward layer.
        """
        if now.phase == "plain":
            return None
        if self.stochastic and uniform(self.seed, now.step, layer, linear) >= now.alpha:
            return None
        return now.alpha

    def learning_rate_factor(self, step: int) -> float:
        """Multiplies train.learning_rate: (step + 1)/warm-up, then a cosine from 1 down to min_learning_rate_ratio."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        low = self.min_learning_rate_ratio
        return low + (1.0 - low) * 0.5 * (1.0 + math.cos(math.pi * done))

    def expected_drawn_share(self, step: int) -> float:
        """Expected share of linears that compute their guide in a step: all while guided, alpha of them with the coin."""
        if step >= self.guided_steps:
            return 0.0
        return self.alpha(step) if self.stochastic else 1.0

    def expected_guided_share(self) -> float:
        """The same over the whole run: guided/total, or with the coin sum(alpha)/total = (guided + 1)/2/total."""
        drawn = (self.guided_steps + 1) / 2 if self.stochastic and self.guided_steps else self.guided_steps
        return drawn / self.total_steps


def of(config: Config) -> Schedule:
    """The clock of a run."""
    steps = config.train.steps
    return Schedule(
        total_steps=steps,
        guided_steps=round(config.guide.share * steps) if config.guided else 0,
        warmup_steps=math.ceil(config.train.warmup_share * steps),
        min_learning_rate_ratio=config.train.min_learning_rate_ratio,
        stochastic=config.guide.stochastic,
        seed=config.train.seed,
    )


def due(step: int, interval: int, total: int) -> bool:
    """True after the last step and after every ``interval`` ones (0: only after the last)."""
    return step == total or (interval > 0 and step % interval == 0)


def uniform(seed: int, step: int, layer: int, linear: int) -> float:
    """The coin: a counter-based hash of its arguments in [0, 1), the same on every rank, micro-step and recomputation."""
    key = struct.pack("<qqqq", seed & (2**63 - 1), step, layer, linear)
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") / 2**64
