"""The clock: the paper's formulas, a golden stochastic run, and a coin that depends on its four arguments alone."""

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

from sffn_dist.reading import from_tree
from sffn_dist.schedule import Schedule, of, uniform


def clock(**over: Any) -> Schedule:
    plain = Schedule(total_steps=20, guided_steps=10, warmup_steps=2, min_learning_rate_ratio=0.1, stochastic=False, seed=0)
    return replace(plain, **over)


# --------------------------------------------------------------------------------------------------------------- formulas


@pytest.mark.parametrize(
    ("step", "guided", "alpha"),
    [
        *((0, 8, 1.0), (1, 8, 0.9619397662556434), (2, 8, 0.8535533905932737), (4, 8, 0.5), (6, 8, 0.14644660940672627)),
        *((7, 8, 0.03806023374435663), (8, 8, 0.0), (9, 8, 0.0), (0, 1, 1.0), (1, 1, 0.0), (0, 0, 0.0), (5, 0, 0.0)),
        *((1, 3, 0.75), (2, 3, 0.25)),
    ],
)
def test_alpha_golden(step: int, guided: int, alpha: float) -> None:
    assert clock(guided_steps=guided).alpha(step) == pytest.approx(alpha, abs=1e-15)


@given(st.integers(1, 5000), st.data())
def test_alpha_is_half_a_cosine(guided: int, data: st.DataObject) -> None:
    now, step = clock(guided_steps=guided), data.draw(st.integers(0, 2 * guided))
    assert now.alpha(0) == 1.0
    assert now.alpha(guided) == 0.0
    assert now.alpha(step) >= now.alpha(step + 1)
    if step < guided:
        assert 0 < now.alpha(step) <= 1
        assert now.alpha(step) + now.alpha(guided - step) == pytest.approx(1.0)
    else:
        assert now.alpha(step) == 0.0


def test_learning_rate_warms_up_linearly_then_falls_by_a_cosine() -> None:
    now = clock(total_steps=100, warmup_steps=10)
    assert [now.learning_rate_factor(step) for step in range(10)] == pytest.approx([0.1 * (step + 1) for step in range(10)])
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
    tree: dict[str, Any] = {
        "model": {"layers": 2, "width": 8, "heads": 2},
        "ffn": {"kind": "low_rank", "rank": 2},
        "guide": {"mode": "fixed_step", "share": 0.25, "stochastic": True},
        "train": {"steps": 1000, "seed": 5},
    }
    assert of(from_tree(tree)) == Schedule(1000, 250, 100, 0.1, True, 5)
    assert of(from_tree({**tree, "guide": {}})).guided_steps == 0
    assert of(from_tree({**tree, "ffn": {}})).guided_steps == 0, "a dense FFN has nothing to guide"
    whole = of(from_tree({**tree, "guide": {"mode": "fixed_step", "share": 1.0}}))
    assert whole.guided_steps == whole.total_steps
    assert whole.at(999).phase == "guided"


@pytest.mark.parametrize("step", [-1, 20, 21, 10**9])
def test_a_step_outside_the_run_raises(step: int) -> None:
    with pytest.raises(ValueError, match=f"step {step} "):
        clock().at(step)


def test_expected_guided_share_is_the_mean_of_what_happens() -> None:
    assert clock().expected_guided_share() == 0.5
    assert clock(guided_steps=0).expected_guided_share() == 0.0
    halved = clock(total_steps=2000, guided_steps=1000, stochastic=True).expected_guided_share()
    assert halved == pytest.approx(0.25, abs=1e-3)  # the paper's half of the dense linear, over the guided half


# ------------------------------------------------------------------------------------------------------------------- coin

PAIRS = [(1, 0), (1, 1), (2, 0), (7, 1)]
# (step, alpha, phase, what of PAIRS computes its guide); 20 steps, 10 of them guided, seed 7
GOLDEN = [
    *((0, 1.000000, "guided", "xxxx"), (1, 0.975528, "guided", "xxxx")),
    *((2, 0.904508, "guided", "xxxx"), (3, 0.793893, "guided", "xxxx")),
    *((4, 0.654508, "guided", "x-x-"), (5, 0.500000, "guided", "-xxx")),
    *((6, 0.345492, "guided", "-x-x"), (7, 0.206107, "guided", "----")),
    *((8, 0.095492, "guided", "x---"), (9, 0.024472, "guided", "----")),
    *((10, 0.000000, "plain", "----"), (11, 0.000000, "plain", "----")),
    *((12, 0.000000, "plain", "----"), (13, 0.000000, "plain", "----")),
    *((14, 0.000000, "plain", "----"), (15, 0.000000, "plain", "----")),
    *((16, 0.000000, "plain", "----"), (17, 0.000000, "plain", "----")),
    *((18, 0.000000, "plain", "----"), (19, 0.000000, "plain", "----")),
]


def test_golden_stochastic_run() -> None:
    run = clock(stochastic=True, seed=7)
    for step, alpha, phase, taken in GOLDEN:
        now = run.at(step)
        assert (now.step, now.data_step, now.phase) == (step, step, phase)
        assert now.alpha == pytest.approx(alpha, abs=1e-6)
        weights = [run.guide_weight(now, *pair) for pair in PAIRS]
        assert weights == [now.alpha if flag == "x" else None for flag in taken], f"step {step}"
    assert [row[0] for row in GOLDEN] == list(range(20))


def test_without_the_coin_every_linear_is_guided_until_the_end_of_the_phase() -> None:
    run = clock()
    for step in range(20):
        now = run.at(step)
        assert run.guide_weight(now, 3, 1) == (now.alpha if step < 10 else None)


def test_the_coin_is_drawn_with_probability_alpha() -> None:
    run = clock(total_steps=1000, guided_steps=500, stochastic=True, seed=3)
    for step in (0, 60, 125, 250, 375, 490):
        now = run.at(step)
        draws = [run.guide_weight(now, layer, linear) is not None for layer in range(5000) for linear in (0, 1)]
        share, deviation = sum(draws) / len(draws), math.sqrt(now.alpha * (1 - now.alpha) / len(draws))
        assert abs(share - now.alpha) <= 3 * deviation, f"step {step}: {share} of {now.alpha}"
    steps = [run.at(step) for step in range(500)]
    taken = sum(run.guide_weight(now, layer, 0) is not None for now in steps for layer in range(20))
    expected = sum(now.alpha for now in steps) * 20
    deviation = math.sqrt(sum(now.alpha * (1 - now.alpha) for now in steps) * 20)
    assert abs(taken - expected) <= 3 * deviation
    assert expected / 20 / 1000 == pytest.approx(run.expected_guided_share())


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
    assert {key: uniform(9, *key) for key in asked} == first, "neither the order nor the number of draws matters"
    run = clock(stochastic=True, seed=9)
    longer = replace(run, total_steps=99, warmup_steps=50, min_learning_rate_ratio=0.9)
    for step, layer, linear in asked:
        assert run.guide_weight(run.at(step), layer, linear) == longer.guide_weight(longer.at(step), layer, linear)
    script = "from sffn_dist.schedule import uniform; print(repr(uniform(9, 3, 2, 1)))"
    environment = {**os.environ, "PYTHONHASHSEED": "123", "RANK": "3", "WORLD_SIZE": "4"}
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert float(done.stdout) == first[3, 2, 1], "another process, another hash seed, another rank"


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**62, 2**63 - 1])
def test_large_seeds_draw(seed: int) -> None:
    assert 0 <= uniform(seed, 0, 0, 0) < 1
