"""Plain lines, the bar, and the estimate of remaining time."""

import io

import pytest

from sffn_dist.telemetry.progress import Estimate, Progress, format_duration


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def row(step, **more):
    return {
        "step": step,
        "loss": 7.5,
        "alpha": 0.25,
        "lr": 1e-3,
        "grad_norm": 1.0,
        "tokens_per_s": 12345.6,
        **more,
    }


def test_log_file_gets_a_plain_line_now_and_then():
    out, clock = io.StringIO(), Clock()
    progress = Progress(1000, 900, 2e12, 4e12, stream=out, clock=clock)
    for step in range(900, 1000):
        clock.now += 1.0
        progress.step(row(step))
        if step == 950:
            progress.note("saved\r")
            progress.evaluated(3.25)
    progress.close()
    lines = out.getvalue().splitlines()
    assert "\r" not in out.getvalue()
    steps = [int(line.split()[1].split("/")[0]) for line in lines if line.startswith("step ")]
    assert steps == [901, 902, 903, 913, 923, 933, 943, 953, 963, 973, 983, 993, 1000]
    for part in ("loss 7.5", "alpha 0.25", "12,346 tokens/s", "2 TFLOP/s", "MFU 50.0%", "1 min 39 s left"):
        assert part in lines[0]
    assert "held-out 3.25" in lines[-1]
    assert "held-out" not in lines[0]
    assert "left" not in lines[-1]


def test_terminal_gets_a_bar():
    out = Terminal()
    progress = Progress(3, 0, 2e12, stream=out)
    for step in range(3):
        progress.step(row(step, seconds=1.0), remaining=200.0)
    progress.note("saved")
    progress.close()
    assert "\r" in out.getvalue()
    assert "3/3" in out.getvalue()
    assert "2 TFLOP/s" in out.getvalue()
    assert "saved\n" in out.getvalue()
    assert "MFU" not in out.getvalue()


def test_steps_that_were_passed_over_count():
    out = Terminal()
    progress = Progress(6, 0, 2e12, stream=out)
    for step in (0, 1, 4, 5):
        progress.step(row(step, seconds=1.0))
    progress.close()
    assert progress.done == 6
    assert "6/6" in out.getvalue()


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_silent_when_not_enabled_and_harmless_when_the_stream_is_gone(stream):
    out = stream()
    progress = Progress(2, 0, 1.0, enabled=False, stream=out)
    progress.step(row(0))
    assert out.getvalue() == ""
    progress.note("a warning")
    assert out.getvalue() == "a warning\n"  # what must be known is said all the same
    progress.close()
    progress = Progress(2, 0, 1.0, stream=out)
    out.close()
    progress.step(row(0))
    progress.note("gone")
    progress.close()


def test_estimate_leaves_out_warm_up_and_adds_what_is_not_a_step():
    estimate = Estimate(110, 10, {"evaluation": 2.0, "checkpoint": 0.5})
    assert estimate.remaining(10, 1, 1, 1) is None
    estimate.observe("step", 60.0)
    assert estimate.remaining(11) == 99 * 60.0  # all that is known
    estimate.observe("step", 1.0)
    assert estimate.remaining(12) == 98.0
    for seconds in (1.0, 50.0, 1.0):  # one hiccup
        estimate.observe("step", seconds)
    assert estimate.remaining(60) == 50.0
    assert estimate.remaining(60, 3, 2, 1) == 50.0 + 3 * 2.0 + 2 * 0.5
    estimate.observe("evaluation", 10.0)
    estimate.observe("checkpoint", 30.0, count=2)
    estimate.observe("sample", 4.0)
    assert estimate.remaining(60, 3, 2, 1) == 50.0 + 3 * 10.0 + 2 * 15.0 + 4.0
    assert estimate.remaining(110) == 0.0
    for _ in range(50):  # a later phase with slower steps
        estimate.observe("step", 3.0)
    assert estimate.remaining(60) == 150.0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.6, "1 min 00 s"),
        (200, "3 min 20 s"),
        (3599.7, "1 h 00 min"),
        (7500, "2 h 05 min"),
        (3 * 86400 + 4 * 3600, "3 days 4 h"),
        (41 * 86400, "41 days"),
        (-3, "0 s"),
        (float("inf"), "unknown"),
    ],
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text
