"""The rules by which a step is bad, and by which a run goes back: no training here."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sffn_dist.config import ConfigError, Guards
from sffn_dist.training.setbacks import NAME, DivergedError, Setbacks
from sffn_dist.training.spikes import FEWEST, Losses

LOSSES = st.lists(st.floats(0.1, 12.0), min_size=FEWEST, max_size=60)


@given(LOSSES, st.floats(0.0, 20.0), st.floats(0.0, 2.0))
def test_the_rule_is_the_formula(recent: list[float], deviations: float, margin: float) -> None:
    """Against numpy-free arithmetic of its own, at and around the threshold."""
    losses = Losses(Guards(spike_window=32, spike_deviations=deviations, spike_margin=margin), recent)
    window = sorted(recent[-32:])

    def middle(values: list[float]) -> float:
        values, half = sorted(values), len(values) // 2
        return values[half] if len(values) % 2 else (values[half - 1] + values[half]) / 2

    center = middle(window)
    threshold = max(deviations * 1.4826 * middle([abs(value - center) for value in window]), margin)
    assert losses.objection(center) is None
    above = losses.objection(center + threshold * 1.001 + 1e-6)
    assert (above is not None) == (deviations > 0)
    assert losses.objection(center + threshold * 0.999 - 1e-6) is None
    assert losses.objection(0.0) is None, "a low loss is no spike"


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_always_bad(loss: float) -> None:
    assert Losses(Guards(spike_deviations=0)).objection(loss) == f"loss {loss}"


def test_few_losses_call_nothing_a_spike() -> None:
    assert Losses(Guards(), [1.0] * (FEWEST - 1)).objection(1e6) is None
    assert Losses(Guards(), [1.0] * FEWEST).objection(1e6)
    assert Losses(Guards(spike_window=8), [1.0] * 8).objection(1e6), "or a window full of them"


def test_one_outlier_moves_the_threshold_little() -> None:
    """Where a mean and a standard deviation would let the next one pass."""
    losses = Losses(Guards(), [3.0 + 0.01 * (i % 5) for i in range(40)])
    losses.accept(50.0)
    assert losses.objection(4.0)


def after(setbacks: Setbacks, *steps: int) -> Setbacks:
    for step in steps:
        setbacks.note(step, "bad", math.nan)
    return setbacks


def test_only_steps_in_a_row_send_a_run_back(tmp_path: Path) -> None:
    setbacks = after(Setbacks(Guards(rollback_after=2), tmp_path), 4)
    setbacks.note(5, None, 3.0)
    assert not after(setbacks, 6).too_many
    assert after(setbacks, 7).too_many
    assert setbacks.turn_back() == 6
    assert (setbacks.passed, setbacks.trouble, setbacks.too_many) == ({6, 7}, 7, False)
    assert list(setbacks.losses.recent) == [3.0]


def test_what_is_passed_over_outlives_the_process(tmp_path: Path) -> None:
    setbacks = after(Setbacks(Guards(), tmp_path), 6, 7, 8)
    setbacks.turn_back()
    setbacks.returned(4)
    setbacks.write()
    again = Setbacks(Guards(), tmp_path)
    assert (again.passed, again.returns, again.trouble) == ({6, 7, 8}, [4], 8)
    assert after(again, 9, 10, 11).turn_back() == 3, "further back than the last time"
    again.returned(0)
    again.saved(9)
    assert again.returns == [4, 0], "a checkpoint before the end of the trouble is no progress"
    again.saved(12)
    assert again.returns == [4, 0], "nor is one of the state from before it, after the bad steps were passed over"
    assert not again.calm
    again.note(12, None, 3.0)
    assert again.calm
    again.saved(13)
    assert again.returns == []


def test_enough_is_enough(tmp_path: Path) -> None:
    setbacks = Setbacks(Guards(rollbacks=0), tmp_path)
    with pytest.raises(DivergedError, match=r"steps 3 to 5 could not be taken, after 0 returns .*guards.rollbacks = 0"):
        after(setbacks, 3, 4, 5).turn_back()


@pytest.mark.parametrize("text", ["", "[]", '{"steps": ["x"], "returns": [], "trouble": 0}', '{"steps": [1]}'])
def test_a_damaged_record_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / NAME).write_text(text)
    with pytest.raises(ConfigError, match=r"passed_over\.json: cannot be read"):
        Setbacks(Guards(), tmp_path)


def test_a_record_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    setbacks = Setbacks(Guards(), tmp_path)
    setbacks._path = tmp_path / "nowhere" / NAME
    setbacks.write()
    assert "a restart will not know which batches to pass over" in caplog.text
