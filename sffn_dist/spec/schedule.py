"""The schedule: everything about a step as pure functions of (config, step). Imports no torch.

The optimiser's global step is the only state of a run besides weights and moments; resuming is loading those
three.

    alpha(step)  over the guided steps [begin, end), x = (step - begin) / (end - begin); 0 outside
                 decay(x): guide.schedule, a curve of spec/decay.py   (paper, section 4)
    lr(step)     linear warm-up to 1, then decay to min_ratio at the end of the whole run   (paper, appendix)
    data(step)   step; a step after the first pass reads what the first guided one read, the next what the
                 second read, ...

    phase        plain -> guided -> plain -> repeat, each where it has steps; the guide's parameters exist in
                 the guided phase alone
"""

from __future__ import annotations

import hashlib
import itertools
import math
import struct
from dataclasses import dataclass
from typing import Literal

from sffn_dist.spec import changes, counts
from sffn_dist.spec.config import Config, ConfigError, Train
from sffn_dist.spec.decay import GUIDE_SCHEDULES, LEARNING_RATE_SCHEDULES

PhaseName = Literal["plain", "guided", "repeat"]


@dataclass(frozen=True)
class StepSchedule:
    """What a step is: its guide weight, phase, learning-rate factor and the step whose data it reads."""

    step: int
    alpha: float
    phase: PhaseName
    learning_rate_factor: float
    data_step: int


@dataclass(frozen=True)
class Phase:
    """Steps ``first`` .. ``end`` - 1 of a run."""

    name: PhaseName
    first: int
    end: int


@dataclass(frozen=True)
class EarlierRecipe:
    """The settings of the steps before ``end``, and how many steps the run was to have then."""

    end: int
    train: Train
    total_steps: int


@dataclass(frozen=True)
class Schedule:
    """A run's schedule; build it with :func:`build_schedule`.

    ``first_pass`` steps read new data; the rest of ``total_steps`` repeats that of the guided ones,
    ``guide_begin`` to ``guide_end`` - 1.
    """

    total_steps: int
    first_pass: int
    guide_begin: int
    guide_end: int
    warmup_steps: int
    min_learning_rate_ratio: float
    guide_schedule: str  # a curve of spec/decay.py, as learning_rate_schedule
    stochastic: bool
    seed: int
    learning_rate_schedule: str = "cosine"
    earlier: tuple[EarlierRecipe, ...] = ()  # where the run was changed on the way, oldest first

    def at(self, step: int) -> StepSchedule:
        """Raises ValueError outside [0, total_steps)."""
        if not 0 <= step < self.total_steps:
            raise ValueError(f"step {step} is outside the run's 0..{self.total_steps - 1}")
        return StepSchedule(
            step, self.alpha(step), self._phase(step), self.learning_rate_factor(step), self._data_step(step)
        )

    def guided(self, step: int) -> bool:
        """True if the guide's parameters exist in this step; False at ``total_steps``, the end of the run."""
        return self.guide_begin <= step < self.guide_end and step < self.total_steps

    @property
    def guided_steps(self) -> int:
        return self.guide_end - self.guide_begin

    def _phase(self, step: int) -> PhaseName:
        if self.guided(step):
            return "guided"
        return "plain" if step < self.first_pass else "repeat"

    def _data_step(self, step: int) -> int:
        return step if step < self.first_pass else self.guide_begin + step - self.first_pass

    def phases(self) -> list[Phase]:
        """The run from its first step to its last."""
        edges = sorted({0, self.guide_begin, self.guide_end, self.first_pass, self.total_steps})
        return [Phase(self._phase(first), first, end) for first, end in itertools.pairwise(edges)]

    def alpha(self, step: int) -> float:
        """Weight of the guide: 1 at the first guided step, 0 from ``guide_end`` on, and before."""
        if not self.guide_begin <= step < self.guide_end:
            return 0.0
        done = (step - self.guide_begin) / self.guided_steps
        return GUIDE_SCHEDULES[self.guide_schedule](done)

    def guide_weight(self, step_schedule: StepSchedule, layer: int, linear: int) -> float | None:
        """alpha where this linear computes its guide in this step, None where it does not.

        Stochastic (paper, section 4): with probability alpha the linear uses the mix, still weighted by
        alpha, else U(V x) alone. ``linear`` is 0 for the first and 1 for the second projection of the
        feed-forward layer.
        """
        if step_schedule.phase != "guided":
            return None
        if self.stochastic and uniform(self.seed, step_schedule.step, layer, linear) >= step_schedule.alpha:
            return None
        return step_schedule.alpha

    def learning_rate_factor(self, step: int) -> float:
        """Multiplies train.learning_rate: (step + 1)/warm-up, then from 1 down to min_learning_rate_ratio."""
        warmup, total, low = self.warmup_steps, self.total_steps, self.min_learning_rate_ratio
        curve = self.learning_rate_schedule
        for recipe in self.earlier:
            if step < recipe.end:
                warmup, total = _warmup_steps(recipe.train, recipe.total_steps), recipe.total_steps
                low, curve = recipe.train.min_learning_rate_ratio, recipe.train.learning_rate_schedule
                break
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / max(1, total - warmup)
        return low + (1.0 - low) * LEARNING_RATE_SCHEDULES[curve](done)

    def recipe(self, step: int, current: Train) -> Train:
        """The settings of a step: ``current`` ones, the config's, or those that the run had then."""
        return next((recipe.train for recipe in self.earlier if step < recipe.end), current)

    def expected_drawn_fraction(self, step: int) -> float:
        """Expected share of linears that compute their guide in a step: all while guided, alpha of them
        with the coin.
        """
        if not self.guided(step):
            return 0.0
        return self.alpha(step) if self.stochastic else 1.0

    def expected_drawn_steps(self) -> float:
        """The same summed over the run: guided steps n, or with the coin the sum of alpha, (n + 1)/2 for
        every curve.
        """
        n = self.guided_steps
        return (n + 1) / 2 if self.stochastic and n else float(n)


def build_schedule(config: Config) -> Schedule:
    """The schedule of a run.

    Where it was changed on the way, the guided steps stay those that they were, unless the change named a
    setting of the guide; the learning rate follows the new settings from the change on.

    Raises ConfigError where ``train.epochs`` was not made steps yet (data/overview.py).
    """
    steps, earlier = config.train.steps, []
    if not steps:
        rule = "its steps are known once data.source is prepared, which the first start does"
        raise ConfigError([f"train.epochs = {config.train.epochs}: {rule}; until then set train.steps"])
    spans = [settings for _, settings in changes.history(config)]
    begin, end = _guided(spans[0])
    for change, was, then in zip(config.changes, spans[:-1], spans[1:], strict=True):
        earlier.append(EarlierRecipe(change.step, was.train, was.train.steps + _repeated(was, begin, end)))
        if any(key.startswith("guide.") for key in change.before):
            begin, end = _guided(then)
        begin, end = min(begin, then.train.steps), min(end, then.train.steps)
    total_steps = steps + _repeated(config, begin, end)
    return Schedule(
        total_steps=total_steps,
        first_pass=steps,
        guide_begin=begin,
        guide_end=end,
        warmup_steps=_warmup_steps(config.train, total_steps),
        min_learning_rate_ratio=config.train.min_learning_rate_ratio,
        guide_schedule=config.guide.schedule,
        stochastic=config.guide.stochastic,
        seed=config.train.seed,
        learning_rate_schedule=config.train.learning_rate_schedule,
        earlier=tuple(earlier),
    )


def _repeated(config: Config, begin: int, end: int) -> int:
    return end - begin if config.guide.mode == "fixed_flop" else 0


def _warmup_steps(train: Train, total_steps: int) -> int:
    return math.ceil(train.warmup_share * total_steps)


def _guided(config: Config) -> tuple[int, int]:
    """First guided step, and the one after the last."""
    guide, steps = config.guide, config.train.steps
    if guide.mode == "off" or not config.structured:
        return 0, 0
    if guide.mode == "window":
        return guide.begin, steps if guide.end is None else guide.end
    share = guide.fraction if guide.mode == "fixed_step" else equal_flops_fraction(config)
    return 0, round(share * steps)


def equal_flops_fraction(config: Config) -> float:
    """The share r of train.steps that ``fixed_flop`` guides and repeats (paper, section 4).

    r = (D - S) / (S + c G)

    FLOPs a token of the structured model S, of the same model with dense feed-forward layers D, of all guides
    G; c is 1/2 with the coin, else 1. So steps (1 + r) S + c r steps G = steps D: the whole run costs what
    the dense one costs. Not above 0 where D <= S.
    """
    dense, own = counts.flops_per_token(counts.all_dense(config)), counts.flops_per_token(config)
    guide = counts.guide_flops_per_token(config) * (0.5 if config.guide.stochastic else 1.0)
    return (dense - own) / (own + guide)


def flops(config: Config, phase: Phase | None = None) -> int:
    """Expected FLOPs of a phase, or of the whole run, forward and backward, over all ranks."""
    run_schedule = build_schedule(config)
    steps = run_schedule.total_steps if phase is None else phase.end - phase.first
    drawn = run_schedule.expected_drawn_steps() if phase is None or phase.name == "guided" else 0.0
    per_step = counts.flops_per_token(config) * config.tokens_per_step
    return steps * per_step + round(counts.guide_flops_per_token(config) * config.tokens_per_step * drawn)


def windows(tokens: int, sequence: int) -> int:
    """Samples of ``sequence`` tokens, and one more for the last label, that ``tokens`` tokens hold."""
    return max(0, (tokens - 1) // sequence)


def epochs(config: Config, train_tokens: int, steps: int) -> float:
    """Passes over ``train_tokens`` tokens of training data that the first ``steps`` steps of a run make; a
    phase that repeats data passes over it again.

    0 where the data hold no sample.
    """
    samples = windows(train_tokens, config.model.sequence)
    return steps * config.train.global_batch_size / samples if samples else 0.0


def interval_reached(step: int, interval: int, total: int) -> bool:
    """True after the last step and after every ``interval`` ones (0: only after the last)."""
    return step == total or (interval > 0 and step % interval == 0)


def uniform(seed: int, step: int, layer: int, linear: int) -> float:
    """The coin: a counter-based hash of its arguments in [0, 1), the same on every rank, micro-step and
    recomputation.
    """
    key = struct.pack("<qqqq", seed & (2**63 - 1), step, layer, linear)
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") / 2**64
