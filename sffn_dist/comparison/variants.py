"""Variants of one config that a comparison trains: what they are called, which sizes they get, for how many
steps they run.

A variant is written ``kind[:size=number ...][+guide]``. Sizes that are not written are those of the config's
own structure, or the ones whose feed-forward layers have as many parameters, biases included, as nearly as
can be. No formula for that stands here: candidate configs are counted. Standard library only.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sffn_dist.spec import counts, loading, schedule, validation
from sffn_dist.spec.config import Config, ConfigError
from sffn_dist.structured.registry import DENSE, structure_class, structured_kinds

Equal = Literal["flops", "steps"]

# kind -> the sizes that may be written
NARROW = "dense_narrow"
SIZES: dict[str, tuple[str, ...]] = {
    DENSE: (),
    NARROW: ("width",),
    **{kind: structure_class(kind).settings for kind in structured_kinds()},
}
UNSTRUCTURED = (DENSE, NARROW)
GRAMMAR = "kind[:size=number ...][+guide], kind one of " + ", ".join(SIZES)
USUAL_BLOCKS = 4  # of a kind with rank and blocks, where the config names none: the paper's
ROUND = 8  # ranks are multiples of it where that costs at most SLACK of the parameters aimed at
SLACK = 0.01
# what a comparison sets by itself, and what sets it
TAKEN = {"train.seed": "--seeds", "run.dir": "--out", "guide.mode": "+guide and --equal"}


@dataclass(frozen=True)
class Variant:
    """A kind of feed-forward layer, the sizes written for it, and whether its training is guided."""

    kind: str
    sizes: tuple[tuple[str, int], ...] = ()
    guide: bool = False

    @property
    def label(self) -> str:
        return "".join([self.kind, *(f":{key}={value}" for key, value in self.sizes), "+guide" * self.guide])

    @property
    def folder(self) -> str:
        """The label as the name of a folder."""
        return self.label.replace(":", "_")


@dataclass(frozen=True)
class PlannedVariant:
    """A variant as it is trained: the config of its runs but for seed and folder, and the overrides that
    make it.
    """

    variant: Variant
    config: Config
    overrides: tuple[str, ...]

    @property
    def label(self) -> str:
        return self.variant.label

    @property
    def sizes(self) -> dict[str, int]:
        """ffn.width of a dense one, ffn.rank and ffn.blocks of a structured one, as far as its kind has
        them.
        """
        keys = ("width",) if self.variant.kind in UNSTRUCTURED else SIZES[self.variant.kind]
        width = self.config.ffn_width
        return {key: width if key == "width" else getattr(self.config.ffn, key) for key in keys}

    @property
    def steps(self) -> int:
        """Steps of the run, repeated ones included."""
        return schedule.build_schedule(self.config).total_steps

    @property
    def flops(self) -> int:
        """Expected training FLOPs, forward and backward, guide included."""
        return schedule.flops(self.config)


def parse(text: str) -> list[Variant]:
    """``dense,low_rank:rank=64+guide`` -> variants; raises ConfigError with everything that is wrong."""
    variants: list[Variant] = []
    problems: list[str] = []
    for word in text.split(","):
        try:
            variant = _parse_one(word.strip())
        except ConfigError as error:
            problems += error.problems
            continue
        if variant in variants:
            problems.append(f"variant {variant.label}: named twice")
        variants.append(variant)
    if problems:
        raise ConfigError(problems)
    return variants


def _parse_one(word: str) -> Variant:
    body, plus, suffix = word.partition("+")
    kind, *written = body.split(":")
    if kind not in SIZES or (plus and suffix != "guide"):
        raise ConfigError([f"variant {word!r}: must read {GRAMMAR}"])
    if plus and kind in UNSTRUCTURED:
        raise ConfigError([f"variant {word!r}: a dense feed-forward layer has nothing to guide"])
    sizes: dict[str, int] = {}
    for item in written:
        key, _, number = item.partition("=")
        if key not in SIZES[kind]:
            can = " and ".join(SIZES[kind]) or "no size (dense_narrow:width=... does)"
            raise ConfigError([f"variant {word!r}: {kind} takes {can}, not {key!r}"])
        if key in sizes or not re.fullmatch(r"[1-9]\d{0,8}", number):
            raise ConfigError(
                [f"variant {word!r}: {key} must be given once, as a whole number above 0, not {number!r}"]
            )
        sizes[key] = int(number)
    return Variant(kind, tuple((key, sizes[key]) for key in SIZES[kind] if key in sizes), bool(plus))


def seeds(text: str) -> list[int]:
    """``0,1,2`` -> seeds; raises ConfigError."""
    words = [word.strip() for word in text.split(",")]
    wrong = [word for word in words if not re.fullmatch(r"\d{1,18}", word)]
    if wrong:
        raise ConfigError(
            [f"--seeds {text}: {wrong[0]!r} is no seed; must be whole numbers from 0 on, with commas between"]
        )
    numbers = [int(word) for word in words]
    if len(set(numbers)) < len(numbers):
        raise ConfigError([f"--seeds {text}: names a seed twice"])
    return numbers


# ------------------------------------------------------------------------------------------------------ sizes


def ffn_parameters(config: Config) -> int:
    """Parameters of all feed-forward layers, matrices and biases, dense layers among structured ones
    included.
    """
    parts = counts.parameters_by_part(config)
    return parts["ffn_dense"] + parts["ffn_structured"]


def with_ffn(config: Config, **values: Any) -> Config:
    """The config with other values in its ffn section; not validated."""
    return config.model_copy(update={"ffn": config.ffn.model_copy(update=values)})


def sizes_of(variant: Variant, config: Config) -> dict[str, int]:
    """The sizes that ``variant`` gets: written ones, the config's own, or those of the same number of
    feed-forward parameters.

    Raises ConfigError where sizes are to be found and the config is not structured, or where none fits.
    """
    sizes = dict(variant.sizes)
    missing = [key for key in SIZES[variant.kind] if key not in sizes]
    if not missing:
        return sizes
    if not config.structured:
        raise ConfigError(
            [
                f"variant {variant.label}: ffn.kind = {config.ffn.kind!r} has no structured layer to take "
                f"the number of parameters "
                f"from; write {', '.join(missing)} (as in {variant.kind}:{missing[0]}=...), or set a "
                f"structured ffn.kind"
            ]
        )
    if variant.kind == config.ffn.kind and not sizes:
        return {key: getattr(config.ffn, key) for key in missing}
    return _searched(variant, config, sizes)


def _searched(variant: Variant, config: Config, sizes: dict[str, int]) -> dict[str, int]:
    target, smaller = ffn_parameters(config), min(config.model.width, config.ffn_width)
    if variant.kind == NARROW:
        p = config.parallel.tensor
        return {
            "width": _nearest(
                with_ffn(config, kind=DENSE), "width", range(p, 2 * config.ffn_width + 1, p), target
            )
        }
    blank = with_ffn(config, kind=variant.kind, rank=None, blocks=None)
    if SIZES[variant.kind] == ("blocks",):
        # fewer blocks, more parameters
        fitting = [
            b
            for b in range(smaller, 0, -1)
            if config.model.width % b == 0 and _fits(with_ffn(blank, blocks=b))
        ]
        if not fitting:
            raise ConfigError(
                [f"variant {variant.label}: no ffn.blocks fits model.width, ffn.width and parallel.tensor"]
            )
        return {"blocks": _nearest(blank, "blocks", fitting, target)}
    blocks = 1
    if "blocks" in SIZES[variant.kind]:
        blocks = sizes["blocks"] = sizes.get("blocks") or config.ffn.blocks or USUAL_BLOCKS
        blank = with_ffn(blank, blocks=blocks)
    if blocks > smaller:
        raise ConfigError(
            [f"variant {variant.label}: blocks = {blocks}: must not exceed {smaller}, the smaller width"]
        )
    return {"rank": _nearest_rank(blank, blocks, smaller, target), **sizes}


def _fits(config: Config) -> bool:
    return not [*validation.problems(config)]


def _nearest(config: Config, key: str, values: Sequence[int], target: int) -> int:
    """Of ``values``, sorted by the parameters they give, the one for ffn.``key`` whose feed-forward
    parameters are nearest.
    """

    def count(value: int) -> int:
        return ffn_parameters(with_ffn(config, **{key: value}))

    above = bisect_left(values, target, key=count)
    return min(values[max(0, above - 1) : above + 1], key=lambda value: abs(count(value) - target))


def _nearest_rank(config: Config, blocks: int, limit: int, target: int) -> int:
    best = _nearest(config, "rank", range(blocks, limit + 1, blocks), target)
    unit = math.lcm(blocks, ROUND)
    if unit > limit:
        return best
    rounded = _nearest(config, "rank", range(unit, limit + 1, unit), target)
    miss = [abs(ffn_parameters(with_ffn(config, rank=rank)) - target) for rank in (best, rounded)]
    return rounded if miss[1] <= max(miss[0], SLACK * target) else best


# --------------------------------------------------------------------------------------------------- the plan


def planned_variants(
    path: str, overrides: Iterable[str], variants: Iterable[Variant], equal: Equal
) -> list[PlannedVariant]:
    """Every variant as it is trained, in the order given.

    ``equal`` "flops": as many training FLOPs as the dense model spends in train.steps; "steps": train.steps
    each. All are evaluated on equally many held-out sequences. Raises ConfigError with the problems of all
    variants.
    """
    given_overrides, problems = tuple(overrides), []
    conflicts = {
        key: by for key, by in TAKEN.items() if any(text.partition("=")[0] == key for text in given_overrides)
    }
    if conflicts:
        raise ConfigError(
            [f"{key}: a comparison sets it by {by}; leave it out" for key, by in conflicts.items()]
        )
    target, planned = loading.load(path, given_overrides), []
    schedule.build_schedule(target)  # which refuses train.epochs: what is compared is counted in steps
    for variant in variants:
        try:
            planned.append(_planned_variant(path, given_overrides, variant, target, equal))
        except ConfigError as error:
            prefix = f"variant {variant.label}: "
            problems += [
                problem if problem.startswith(prefix) else prefix + problem for problem in error.problems
            ]
    problems += _twins(planned)
    if problems:
        raise ConfigError(problems)
    windows = min(entry.config.evaluation_sequences for entry in planned)
    return [
        entry
        if entry.config.evaluation_sequences == windows
        else _loaded(path, entry.variant, (f"evaluation.sequences={windows}",), entry.overrides)
        for entry in planned
    ]


def _loaded(
    path: str, variant: Variant, own: Iterable[str], given_overrides: tuple[str, ...]
) -> PlannedVariant:
    overrides = loading.merge_overrides(given_overrides, own)
    return PlannedVariant(variant, loading.load(path, overrides), overrides)


def _planned_variant(
    path: str, given_overrides: tuple[str, ...], variant: Variant, target: Config, equal: Equal
) -> PlannedVariant:
    dense = variant.kind in UNSTRUCTURED
    own = [f"ffn.kind={DENSE if dense else variant.kind}"]
    own += [f"ffn.{key}={value}" for key, value in sizes_of(variant, target).items()]
    if dense and target.recompute == "bottleneck":
        own.append("recompute=none")  # a dense layer has no bottleneck to keep
    mode = "off"
    if variant.guide:
        mode = "fixed_flop" if equal == "flops" else "fixed_step"
    entry = _loaded(path, variant, (*own, f"guide.mode={mode}"), given_overrides)
    if variant.guide and not schedule.build_schedule(entry.config).guided_steps:
        raise ConfigError([f"guide.mode = {mode}: {validation.unused_settings(entry.config)['guide.mode']}"])
    if equal == "flops" and not variant.guide:
        steps = equal_flops_steps(entry.config, target)
        return _loaded(path, variant, (f"train.steps={steps}",), entry.overrides)
    return entry


def equal_flops_steps(config: Config, target: Config) -> int:
    """Steps of the unguided ``config`` that cost what train.steps of ``target``'s dense model cost, to
    half a step; at least 1.
    """
    return max(1, round(reference_flops(target) / (counts.flops_per_token(config) * config.tokens_per_step)))


def reference_flops(target: Config) -> int:
    """Training FLOPs of the dense model: train.steps x tokens a step x FLOPs a token."""
    return target.train.steps * target.tokens_per_step * counts.flops_per_token(counts.all_dense(target))


def _twins(planned: Sequence[PlannedVariant]) -> list[str]:
    """Variants that come to the same run, such as low_rank and low_rank:rank=R with the config's own R."""
    identities: list[tuple[dict[str, Any], str]] = []
    problems = []
    for entry in planned:
        run_identity = validation.identity(entry.config)
        other = next((label for identity, label in identities if identity == run_identity), None)
        if other:
            problems.append(f"variant {entry.label}: is the same run as variant {other}")
        identities.append((run_identity, entry.label))
    return problems
