"""The rules by which a step is bad, and by which a run goes back: no training here."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sffn_dist.spec.config import ConfigError, Guards
from sffn_dist.training.bad_steps import NAME, BadSteps, DivergedError
from sffn_dist.training.loss_spikes import MIN_LOSSES, LossHistory

LOSSES = st.lists(st.floats(0.1, 12.0), min_size=MIN_LOSSES, max_size=60)


@given(LOSSES, st.floats(0.0, 20.0), st.floats(0.0, 2.0))
def test_the_rule_is_the_formula(recent: list[float], deviations: float, margin: float) -> None:
    """Against numpy-free arithmetic of its own, at and around the threshold."""
    losses = LossHistory(Guards(spike_window=32, spike_deviations=deviations, spike_margin=margin), recent)
    window = sorted(recent[-32:])

    def middle(values: list[float]) -> float:
        values, half = sorted(values), len(values) // 2
        return values[half] if len(values) % 2 else (values[half - 1] + values[half]) / 2

    center = middle(window)
    threshold = max(deviations * 1.4826 * middle([abs(value - center) for value in window]), margin)
    assert losses.skip_reason(center) is None
    above = losses.skip_reason(center + threshold * 1.001 + 1e-6)
    assert (above is not None) == (deviations > 0)
    assert losses.skip_reason(center + threshold * 0.999 - 1e-6) is None
    assert losses.skip_reason(0.0) is None, "a low loss is no spike"


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_always_bad(loss: float) -> None:
    assert LossHistory(Guards(spike_deviations=0)).skip_reason(loss) == f"loss {loss}"


def test_few_losses_call_nothing_a_spike() -> None:
    assert LossHistory(Guards(), [1.0] * (MIN_LOSSES - 1)).skip_reason(1e6) is None
    assert LossHistory(Guards(), [1.0] * MIN_LOSSES).skip_reason(1e6)
    assert LossHistory(Guards(spike_window=8), [1.0] * 8).skip_reason(1e6), "or a window full of them"


def test_one_outlier_moves_the_threshold_little() -> None:
    """Where a mean and a standard deviation would let the next one pass."""
    losses = LossHistory(Guards(), [3.0 + 0.01 * (i % 5) for i in range(40)])
    losses.accept(50.0)
    assert losses.skip_reason(4.0)


def after(bad_steps: BadSteps, *steps: int) -> BadSteps:
    for step in steps:
        bad_steps.record(step, "bad", math.nan)
    return bad_steps


def test_only_steps_in_a_row_send_a_run_back(tmp_path: Path) -> None:
    bad_steps = after(BadSteps(Guards(rollback_after=2), tmp_path), 4)
    bad_steps.record(5, None, 3.0)
    assert not after(bad_steps, 6).needs_rollback
    assert after(bad_steps, 7).needs_rollback
    assert bad_steps.begin_rollback() == 6
    assert (bad_steps.excluded, bad_steps.last_bad_step, bad_steps.needs_rollback) == ({6, 7}, 7, False)
    assert list(bad_steps.losses.recent) == [3.0]


def test_what_is_passed_over_outlives_the_process(tmp_path: Path) -> None:
    bad_steps = after(BadSteps(Guards(), tmp_path), 6, 7, 8)
    bad_steps.begin_rollback()
    bad_steps.record_rollback(4)
    bad_steps.write()
    again = BadSteps(Guards(), tmp_path)
    assert (again.excluded, again.rollbacks, again.last_bad_step) == ({6, 7, 8}, [4], 8)
    assert after(again, 9, 10, 11).begin_rollback() == 3, "further back than the last time"
    again.record_rollback(0)
    again.record_save(9)
    assert again.rollbacks == [4, 0], "a checkpoint before the end of the trouble is no progress"
    again.record_save(12)
    assert again.rollbacks == [4, 0], (
        "nor is one of the state from before it, after the bad steps were passed over"
    )
    assert not again.can_save
    again.record(12, None, 3.0)
    assert again.can_save
    again.record_save(13)
    assert again.rollbacks == []


def test_enough_is_enough(tmp_path: Path) -> None:
    bad_steps = BadSteps(Guards(max_rollbacks=0), tmp_path)
    with pytest.raises(
        DivergedError, match=r"steps 3 to 5 were bad again after 0 rollbacks .*guards.max_rollbacks = 0"
    ):
        after(bad_steps, 3, 4, 5).begin_rollback()


@pytest.mark.parametrize(
    "text", ["", "[]", '{"steps": ["x"], "returns": [], "trouble": 0}', '{"steps": [1]}']
)
def test_a_damaged_record_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / NAME).write_text(text)
    with pytest.raises(ConfigError, match=r"passed_over\.json: cannot be read"):
        BadSteps(Guards(), tmp_path)


def test_a_record_that_cannot_be_written_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad_steps = BadSteps(Guards(), tmp_path)
    bad_steps._path = tmp_path / "nowhere" / NAME
    bad_steps.write()
    assert "a restart will not know which batches are excluded" in caplog.text
