"""The clock: the paper's formulas, golden tables of every mode, and a coin that depends on its four
arguments alone.
"""

from __future__ import annotations

import itertools
import math
import os
import random
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sffn_dist.spec.decay import GUIDE_SCHEDULES, LEARNING_RATE_SCHEDULES
from sffn_dist.spec.loading import from_tree
from sffn_dist.spec.schedule import Phase, Schedule, build_schedule, equal_flops_fraction, uniform

TREE: dict[str, Any] = {
    "model": {"layers": 2, "width": 8, "heads": 2, "sequence": 4, "vocab": 64},
    "ffn": {"kind": "low_rank", "rank": 2},
    "train": {"steps": 1000, "global_batch_size": 8, "seed": 5},
}


def clock(**over: Any) -> Schedule:
    plain = Schedule(
        total_steps=20,
        first_pass=20,
        guide_begin=0,
        guide_end=10,
        warmup_steps=2,
        min_learning_rate_ratio=0.1,
        guide_schedule="cosine",
        stochastic=False,
        seed=0,
    )
    return replace(plain, **over)


def from_config(guide: dict[str, Any], **train: Any) -> Schedule:
    return build_schedule(from_tree({**TREE, "guide": guide, "train": {**TREE["train"], **train}}))


# --------------------------------------------------------------------------------------------------- formulas


@pytest.mark.parametrize(
    ("step", "guided", "alpha"),
    [
        *(
            (0, 8, 1.0),
            (1, 8, 0.9619397662556434),
            (2, 8, 0.8535533905932737),
            (4, 8, 0.5),
            (6, 8, 0.14644660940672627),
        ),
        *(
            (7, 8, 0.03806023374435663),
            (8, 8, 0.0),
            (9, 8, 0.0),
            (0, 1, 1.0),
            (1, 1, 0.0),
            (0, 0, 0.0),
            (5, 0, 0.0),
        ),
        *((1, 3, 0.75), (2, 3, 0.25)),
    ],
)
def test_alpha_golden(step: int, guided: int, alpha: float) -> None:
    assert clock(guide_end=guided).alpha(step) == pytest.approx(alpha, abs=1e-15)
    later = clock(guide_begin=100, guide_end=100 + guided)
    assert later.alpha(100 + step) == pytest.approx(alpha, abs=1e-15)
    assert later.alpha(99) == 0.0, "before guidance begins there is no guide"


def test_linear_alpha() -> None:
    falling = clock(guide_schedule="linear", guide_begin=4, guide_end=8)
    assert [falling.alpha(step) for step in range(3, 10)] == [0.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]


@pytest.mark.parametrize("form", ["cosine", "linear"])
@given(guided=st.integers(1, 5000), data=st.data())
def test_alpha_falls_from_one_to_zero_half_of_it_on_either_side(
    form: str, guided: int, data: st.DataObject
) -> None:
    now, step = (
        clock(guide_end=guided, guide_schedule=form, total_steps=10**5),
        data.draw(st.integers(0, 2 * guided)),
    )
    assert now.alpha(0) == 1.0
    assert now.alpha(guided) == 0.0
    assert now.alpha(step) >= now.alpha(step + 1)
    if step < guided:
        assert 0 < now.alpha(step) <= 1
        assert now.alpha(step) + now.alpha(guided - step) == pytest.approx(1.0)
    else:
        assert now.alpha(step) == 0.0
    assert replace(now, stochastic=True).expected_drawn_steps() == pytest.approx(
        sum(map(now.alpha, range(guided)))
    )


def test_learning_rate_warms_up_linearly_then_falls_by_a_cosine() -> None:
    now = clock(total_steps=100, warmup_steps=10)
    assert [now.learning_rate_factor(step) for step in range(10)] == pytest.approx(
        [0.1 * (step + 1) for step in range(10)]
    )
    assert now.learning_rate_factor(10) == 1.0
    assert now.learning_rate_factor(55) == pytest.approx(0.55)  # half way between 1 and 0.1
    assert now.learning_rate_factor(100) == pytest.approx(0.1)
    factors = [now.learning_rate_factor(step) for step in range(10, 101)]
    assert all(a > b for a, b in itertools.pairwise(factors))
    assert now.learning_rate_factor(40) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 3)))


@pytest.mark.parametrize(("warmup", "low"), [(0, 0.1), (20, 0.0), (1, 1.0), (0, 0.0)])
def test_learning_rate_stays_between_its_ends(warmup: int, low: float) -> None:
    now = clock(warmup_steps=warmup, min_learning_rate_ratio=low)
    assert all(min(low, 1 / max(1, warmup)) <= now.at(step).learning_rate_factor <= 1 for step in range(20))
    assert now.at(warmup if warmup < 20 else 19).learning_rate_factor == 1.0


def test_of_reads_the_config() -> None:
    coin = {"mode": "fixed_step", "fraction": 0.25, "stochastic": True, "schedule": "linear"}
    assert from_config(coin) == Schedule(1000, 1000, 0, 250, 100, 0.1, "linear", True, 5)
    assert from_config({}).guided_steps == 0
    assert build_schedule(from_tree({**TREE, "guide": coin, "ffn": {}})).guided_steps == 0, (
        "a dense FFN has nothing to guide"
    )
    whole = from_config({"mode": "fixed_step", "fraction": 1.0})
    assert whole.guided_steps == whole.total_steps
    assert whole.at(999).phase == "guided"
    assert from_config({"mode": "window", "begin": 7}) == Schedule(
        1000, 1000, 7, 1000, 100, 0.1, "cosine", False, 5
    )
    assert from_config({"mode": "window", "begin": 7, "end": 9, "fraction": 0.1}).phases() == [
        Phase("plain", 0, 7),
        Phase("guided", 7, 9),
        Phase("plain", 9, 1000),
    ]


def test_fixed_flop_repeats_what_it_guided_and_stretches_the_learning_rate() -> None:
    run = from_config({"mode": "fixed_flop"})
    # by hand, MAC a token: embedding 64 x 8, attention 2 x 4 x 64, 12 x 2 x 8 x 4 / 6 of scores, dense layer
    # 512, structured 2 x 2 x 40
    dense, own, guide = 512 + 512 + 128 + 1024, 512 + 512 + 128 + 512 + 160, 512
    share = (dense - own) / (own + guide)
    assert equal_flops_fraction(from_tree({**TREE, "guide": {"mode": "fixed_flop"}})) == pytest.approx(share)
    n = round(share * 1000)
    assert run.phases() == [Phase("guided", 0, n), Phase("plain", n, 1000), Phase("repeat", 1000, 1000 + n)]
    assert [run.at(step).data_step for step in (0, 999, 1000, 1000 + n - 1)] == [0, 999, 0, n - 1]
    assert run.warmup_steps == math.ceil(0.1 * (1000 + n))
    assert run.learning_rate_factor(1000 + n) == pytest.approx(0.1), "the cosine ends with the longer run"
    assert run.learning_rate_factor(1000) > 0.11


@pytest.mark.parametrize("step", [-1, 20, 21, 10**9])
def test_a_step_outside_the_run_raises(step: int) -> None:
    with pytest.raises(ValueError, match=f"step {step} "):
        clock().at(step)


@given(st.integers(1, 60), st.data())
def test_phases_are_what_the_steps_say(steps: int, data: st.DataObject) -> None:
    """Every step lies in one phase; the guide is there in the guided one alone; each repeated step's data
    was read while guided.
    """
    begin = data.draw(st.integers(0, steps))
    end = data.draw(st.integers(begin, steps))
    repeated = data.draw(st.sampled_from([0, end - begin]))
    run = clock(total_steps=steps + repeated, first_pass=steps, guide_begin=begin, guide_end=end)
    named = [phase.name for phase in run.phases() for _ in range(phase.first, phase.end)]
    assert named == [run.at(step).phase for step in range(run.total_steps)]
    for step in range(run.total_steps):
        now = run.at(step)
        assert run.guided(step) == (now.phase == "guided") == (now.alpha > 0)
        assert now.data_step == step or (now.phase == "repeat" and run.guided(now.data_step))
    assert len({run.at(step).data_step for step in range(steps, run.total_steps)}) == repeated
    assert not run.guided(run.total_steps), "at the end of the run the guide is gone"


# ------------------------------------------------------------------------------------------------------- coin

PAIRS = [(1, 0), (1, 1), (2, 0), (7, 1)]
MODES: dict[str, dict[str, Any]] = {
    "off": {"guide_end": 0},
    "fixed_step": {},
    "fixed_flop": {"total_steps": 20, "first_pass": 14, "guide_end": 6},
    "window": {"guide_begin": 5, "guide_end": 15},
    "linear": {"guide_schedule": "linear"},
}
# (step, alpha, phase, data step, which of PAIRS compute their guide) of 20 steps with the coin, seed 7
GOLDEN: dict[str, list[tuple[int, float, str, int, str]]] = {
    "off": [
        (0, 0.000000, "plain", 0, "----"),
        (1, 0.000000, "plain", 1, "----"),
        (2, 0.000000, "plain", 2, "----"),
        (3, 0.000000, "plain", 3, "----"),
        (4, 0.000000, "plain", 4, "----"),
        (5, 0.000000, "plain", 5, "----"),
        (6, 0.000000, "plain", 6, "----"),
        (7, 0.000000, "plain", 7, "----"),
        (8, 0.000000, "plain", 8, "----"),
        (9, 0.000000, "plain", 9, "----"),
        (10, 0.000000, "plain", 10, "----"),
        (11, 0.000000, "plain", 11, "----"),
        (12, 0.000000, "plain", 12, "----"),
        (13, 0.000000, "plain", 13, "----"),
        (14, 0.000000, "plain", 14, "----"),
        (15, 0.000000, "plain", 15, "----"),
        (16, 0.000000, "plain", 16, "----"),
        (17, 0.000000, "plain", 17, "----"),
        (18, 0.000000, "plain", 18, "----"),
        (19, 0.000000, "plain", 19, "----"),
    ],
    "fixed_step": [
        (0, 1.000000, "guided", 0, "xxxx"),
        (1, 0.975528, "guided", 1, "xxxx"),
        (2, 0.904508, "guided", 2, "xxxx"),
        (3, 0.793893, "guided", 3, "xxxx"),
        (4, 0.654508, "guided", 4, "x-x-"),
        (5, 0.500000, "guided", 5, "-xxx"),
        (6, 0.345492, "guided", 6, "-x-x"),
        (7, 0.206107, "guided", 7, "----"),
        (8, 0.095492, "guided", 8, "x---"),
        (9, 0.024472, "guided", 9, "----"),
        (10, 0.000000, "plain", 10, "----"),
        (11, 0.000000, "plain", 11, "----"),
        (12, 0.000000, "plain", 12, "----"),
        (13, 0.000000, "plain", 13, "----"),
        (14, 0.000000, "plain", 14, "----"),
        (15, 0.000000, "plain", 15, "----"),
        (16, 0.000000, "plain", 16, "----"),
        (17, 0.000000, "plain", 17, "----"),
        (18, 0.000000, "plain", 18, "----"),
        (19, 0.000000, "plain", 19, "----"),
    ],
    "fixed_flop": [
        (0, 1.000000, "guided", 0, "xxxx"),
        (1, 0.933013, "guided", 1, "xxxx"),
        (2, 0.750000, "guided", 2, "xx-x"),
        (3, 0.500000, "guided", 3, "xxx-"),
        (4, 0.250000, "guided", 4, "----"),
        (5, 0.066987, "guided", 5, "----"),
        (6, 0.000000, "plain", 6, "----"),
        (7, 0.000000, "plain", 7, "----"),
        (8, 0.000000, "plain", 8, "----"),
        (9, 0.000000, "plain", 9, "----"),
        (10, 0.000000, "plain", 10, "----"),
        (11, 0.000000, "plain", 11, "----"),
        (12, 0.000000, "plain", 12, "----"),
        (13, 0.000000, "plain", 13, "----"),
        (14, 0.000000, "repeat", 0, "----"),
        (15, 0.000000, "repeat", 1, "----"),
        (16, 0.000000, "repeat", 2, "----"),
        (17, 0.000000, "repeat", 3, "----"),
        (18, 0.000000, "repeat", 4, "----"),
        (19, 0.000000, "repeat", 5, "----"),
    ],
    "window": [
        (0, 0.000000, "plain", 0, "----"),
        (1, 0.000000, "plain", 1, "----"),
        (2, 0.000000, "plain", 2, "----"),
        (3, 0.000000, "plain", 3, "----"),
        (4, 0.000000, "plain", 4, "----"),
        (5, 1.000000, "guided", 5, "xxxx"),
        (6, 0.975528, "guided", 6, "xxxx"),
        (7, 0.904508, "guided", 7, "xxxx"),
        (8, 0.793893, "guided", 8, "xxxx"),
        (9, 0.654508, "guided", 9, "-x-x"),
        (10, 0.500000, "guided", 10, "-xxx"),
        (11, 0.345492, "guided", 11, "x--x"),
        (12, 0.206107, "guided", 12, "----"),
        (13, 0.095492, "guided", 13, "---x"),
        (14, 0.024472, "guided", 14, "----"),
        (15, 0.000000, "plain", 15, "----"),
        (16, 0.000000, "plain", 16, "----"),
        (17, 0.000000, "plain", 17, "----"),
        (18, 0.000000, "plain", 18, "----"),
        (19, 0.000000, "plain", 19, "----"),
    ],
    "linear": [
        (0, 1.000000, "guided", 0, "xxxx"),
        (1, 0.900000, "guided", 1, "x-xx"),
        (2, 0.800000, "guided", 2, "xxxx"),
        (3, 0.700000, "guided", 3, "xxxx"),
        (4, 0.600000, "guided", 4, "x-x-"),
        (5, 0.500000, "guided", 5, "-xxx"),
        (6, 0.400000, "guided", 6, "-x-x"),
        (7, 0.300000, "guided", 7, "--x-"),
        (8, 0.200000, "guided", 8, "x-x-"),
        (9, 0.100000, "guided", 9, "----"),
        (10, 0.000000, "plain", 10, "----"),
        (11, 0.000000, "plain", 11, "----"),
        (12, 0.000000, "plain", 12, "----"),
        (13, 0.000000, "plain", 13, "----"),
        (14, 0.000000, "plain", 14, "----"),
        (15, 0.000000, "plain", 15, "----"),
        (16, 0.000000, "plain", 16, "----"),
        (17, 0.000000, "plain", 17, "----"),
        (18, 0.000000, "plain", 18, "----"),
        (19, 0.000000, "plain", 19, "----"),
    ],
}


@pytest.mark.parametrize("mode", MODES)
def test_golden_run(mode: str) -> None:
    run = clock(stochastic=True, seed=7, **MODES[mode])
    for step, alpha, phase, data_step, taken in GOLDEN[mode]:
        now = run.at(step)
        assert (now.step, now.data_step, now.phase) == (step, data_step, phase)
        assert now.alpha == pytest.approx(alpha, abs=1e-6)
        weights = [run.guide_weight(now, *pair) for pair in PAIRS]
        assert weights == [now.alpha if flag == "x" else None for flag in taken], f"step {step}"
    assert [row[0] for row in GOLDEN[mode]] == list(range(20))


def test_without_the_coin_every_linear_is_guided_until_the_end_of_the_phase() -> None:
    run = clock()
    for step in range(20):
        now = run.at(step)
        assert run.guide_weight(now, 3, 1) == (now.alpha if step < 10 else None)


def test_the_coin_is_drawn_with_probability_alpha() -> None:
    run = clock(total_steps=1000, first_pass=1000, guide_end=500, stochastic=True, seed=3)
    for step in (0, 60, 125, 250, 375, 490):
        now = run.at(step)
        draws = [
            run.guide_weight(now, layer, linear) is not None for layer in range(5000) for linear in (0, 1)
        ]
        share, deviation = sum(draws) / len(draws), math.sqrt(now.alpha * (1 - now.alpha) / len(draws))
        assert abs(share - now.alpha) <= 3 * deviation, f"step {step}: {share} of {now.alpha}"
    steps = [run.at(step) for step in range(500)]
    taken = sum(run.guide_weight(now, layer, 0) is not None for now in steps for layer in range(20))
    expected = sum(now.alpha for now in steps) * 20
    deviation = math.sqrt(sum(now.alpha * (1 - now.alpha) for now in steps) * 20)
    assert abs(taken - expected) <= 3 * deviation
    assert expected / 20 == pytest.approx(run.expected_drawn_steps())


def test_each_argument_of_the_coin_matters_and_draws_are_unrelated() -> None:
    base = [uniform(0, step, 1, 0) for step in range(2000)]
    others = {
        "seed": [uniform(1, step, 1, 0) for step in range(2000)],
        "layer": [uniform(0, step, 2, 0) for step in range(2000)],
        "linear": [uniform(0, step, 1, 1) for step in range(2000)],
        "step": [uniform(0, step + 1, 1, 0) for step in range(2000)],
    }
    assert all(0 <= value < 1 for value in base)
    for name, other in others.items():
        assert not set(base[:-1]) & set(other) or name == "step"
        covariance = sum((a - 0.5) * (b - 0.5) for a, b in zip(base, other, strict=True)) / 2000
        assert abs(covariance * 12) < 4 / math.sqrt(2000), f"draws that differ in {name} are correlated"


def test_the_coin_depends_on_nothing_else() -> None:
    asked = [(step, layer, linear) for step in range(6) for layer in range(3) for linear in (0, 1)]
    first = {key: uniform(9, *key) for key in asked}
    random.seed(0)
    random.shuffle(asked)
    assert {key: uniform(9, *key) for key in asked} == first, (
        "neither the order nor the number of draws matters"
    )
    run = clock(stochastic=True, seed=9)
    longer = replace(run, total_steps=99, warmup_steps=50, min_learning_rate_ratio=0.9)
    for step, layer, linear in asked:
        assert run.guide_weight(run.at(step), layer, linear) == longer.guide_weight(
            longer.at(step), layer, linear
        )
    script = "from sffn_dist.spec.schedule import uniform; print(repr(uniform(9, 3, 2, 1)))"
    environment = {**os.environ, "PYTHONHASHSEED": "123", "RANK": "3", "WORLD_SIZE": "4"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", script], capture_output=True, text=True, env=environment, check=True
    )
    assert float(done.stdout) == first[3, 2, 1], "another process, another hash seed, another rank"


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**62, 2**63 - 1])
def test_large_seeds_draw(seed: int) -> None:
    assert 0 <= uniform(seed, 0, 0, 0) < 1


def test_every_curve_of_the_guide_falls_from_1_to_0_and_is_antisymmetric() -> None:
    """A guide's expected FLOPs count on the sum (n + 1)/2."""
    for name, curve in GUIDE_SCHEDULES.items():
        values = [curve(i / 64) for i in range(65)]
        assert (values[0], values[-1]) == (1.0, 0.0), name
        assert values == sorted(values, reverse=True), name
        assert all(abs(a + b - 1.0) < 1e-12 for a, b in zip(values, reversed(values), strict=True)), name


def test_every_curve_of_the_learning_rate_starts_at_1_and_never_rises() -> None:
    for name, curve in LEARNING_RATE_SCHEDULES.items():
        values = [curve(i / 64) for i in range(65)]
        assert values[0] == 1.0, name
        assert values == sorted(values, reverse=True), name


def test_the_learning_rate_falls_as_its_curve_says() -> None:
    falling = clock(
        learning_rate_schedule="linear", total_steps=110, warmup_steps=10, min_learning_rate_ratio=0.2
    )
    assert [falling.learning_rate_factor(step) for step in (9, 10, 60, 110)] == pytest.approx(
        [1.0, 1.0, 0.6, 0.2]
    )
