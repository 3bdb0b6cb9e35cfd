"""The metrics log: each step once, whatever was killed, torn, resumed or full."""

import json
import math
import os
import shutil
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sffn_dist.telemetry.metrics import MetricsLog, read


def row(step, life=0):
    return {"step": step, "tokens": step * 8, "loss": 1 / (step + 1), "life": life}


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_every_step_once_over_any_kills_and_resumes(tmp_path_factory, data):
    path, total = tmp_path_factory.mktemp("run") / "metrics.jsonl", 12
    resume, writer = 0, {}
    for life in range(data.draw(st.integers(0, 4), "kills") + 1):
        before = (
            [line for line in path.read_bytes().splitlines(True) if b"\n" in line] if path.exists() else []
        )
        log = MetricsLog(path, resume)
        kept = path.read_bytes().splitlines(True)
        assert (
            kept == before[: len(kept)] or len(kept) == len(before) + 1
        )  # the last may have lacked but its end of line
        stop = data.draw(st.integers(resume, total), "stop") if life < 4 else total
        for step in range(resume, stop):
            log.write(row(step, life))
            writer[step] = life
        log.close()
        if stop < total:  # killed while the next line was on its way
            part = (json.dumps(row(stop, life)) + "\n").encode()
            cut = data.draw(st.integers(0, len(part)), "bytes of the next line")
            if cut >= len(part) - 1:
                writer[stop] = life
            with open(path, "ab") as file:
                file.write(part[:cut])
        done = stop + (stop < total and cut >= len(part) - 1)
        resume = data.draw(st.integers(0, min(done, total)), "checkpoint")
    with MetricsLog(path, resume) as log:
        for step in range(resume, total):
            log.write(row(step, 9))
            writer[step] = 9
    assert read(path) == [row(step, writer[step]) for step in range(total)]
    assert os.listdir(path.parent) == [path.name]


def test_kept_lines_stay_byte_for_byte(tmp_path):
    path = tmp_path / "metrics.jsonl"
    foreign = b'{"note":  "no step"}\n{ "step":0,"loss" : 1.50, "\\u00e9":[1e2] }\n{"step": 1, "loss": 0.5}\n'
    path.write_bytes(foreign + b'{"step": 2}\n\x00\x00\x00\n{"step": 1')
    MetricsLog(path, 2).close()
    assert path.read_bytes() == foreign
    inode = path.stat().st_ino
    MetricsLog(path, 2).close()
    assert path.stat().st_ino == inode, "a clean file is not rewritten"
    path.write_bytes(foreign[:-1])  # torn between the line and its end: nothing is lost
    MetricsLog(path, 2).close()
    assert path.read_bytes() == foreign


def test_old_file_stays_whole_when_the_rewrite_is_killed(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path, 0) as log:
        for step in range(5):
            log.write(row(step))
    whole = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            MetricsLog(path, 3)
    assert path.read_bytes() == whole
    MetricsLog(path, 3).close()
    assert [line["step"] for line in read(path)] == [0, 1, 2]


def test_not_finite_values_are_seen_and_the_file_stays_strict_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path, 0) as log:
        log.write({"step": 0, "loss": math.nan, "grad_norm": math.inf, "more": [-math.inf, None]})
    line = path.read_text()
    refuse = lambda name: pytest.fail(f"{name} is not JSON")  # noqa: E731
    assert json.loads(line, parse_constant=refuse) == {
        "step": 0,
        "loss": "nan",
        "grad_norm": "inf",
        "more": ["-inf", None],
    }
    (back,) = read(path)
    assert math.isnan(back["loss"])
    assert back["grad_norm"] == math.inf
    assert back["more"] == [-math.inf, None]


def test_steps_must_rise_also_after_a_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path, 0) as log:
        log.write(row(3))
        for bad in (row(3), row(2), {"loss": 1.0}, {"step": "4"}, {"step": True}):
            with pytest.raises(ValueError, match="step"):
                log.write(bad)
    with MetricsLog(path, 4) as log, pytest.raises(ValueError, match="above the last one, 3"):
        log.write(row(3))
    assert read(path) == [row(3)]


def test_reading_leaves_out_only_a_torn_last_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n{"ste')
    assert read(path) == [{"step": 0}, {"step": 1}]
    path.write_text('{"step": 0}\n{"ste\n{"step": 1}\n')
    with pytest.raises(ValueError, match="line 2"):
        read(path)


FULL_DISK = """
import resource, sys
from sffn_dist.telemetry import metrics
def room(n): resource.setrlimit(resource.RLIMIT_FSIZE, (n, resource.RLIM_INFINITY))
path, (start, resume) = sys.argv[1], map(int, sys.argv[2:])
room(start)
log = metrics.MetricsLog(path, resume)
for step in range(resume, 30):
    if step == 20: room(700)   # some space is freed, not enough
    if step == 25: room(resource.RLIM_INFINITY)
    log.write({"step": step, "tokens": 10 ** 9 + step})
    if step == 24:
        log_size = len(open(path, "rb").read())
        assert log_size <= 700 or start == 100, log_size
log.close()
"""


@pytest.mark.parametrize(
    "start", [500, 100]
)  # full while it runs; full from the start, when the old file must be rewritten
def test_full_disk_neither_stops_nor_leaves_holes_or_torn_lines(tmp_path, start):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path, 0) as log:
        for step in range(8):
            log.write({"step": step, "tokens": 10**9 + step})
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(path), str(start), "5"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("cannot be written") == 1
    assert [line["step"] for line in read(path)] == list(range(30))


def test_memory_is_bounded_on_a_disk_that_stays_full(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("sffn_dist.telemetry.metrics.PENDING_LINES", 4)
    (tmp_path / "metrics.jsonl.part").mkdir()
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"st')  # needs the rewrite, which cannot be done
    log = MetricsLog(tmp_path / "metrics.jsonl", 1)
    for step in range(1, 10):
        log.write({"step": step})
    (tmp_path / "metrics.jsonl.part").rmdir()
    log.close()
    assert [line["step"] for line in read(tmp_path / "metrics.jsonl")] == [0, 6, 7, 8, 9]
    assert len(caplog.records) == 1


@pytest.mark.parametrize("removed", ["file", "folder"])
def test_a_log_that_is_removed_goes_on_in_a_new_file(tmp_path, caplog, removed):
    folder = tmp_path / "run"
    folder.mkdir()
    calls = []

    def restore():
        calls.append(1)
        folder.mkdir(exist_ok=True)

    with MetricsLog(folder / "metrics.jsonl", 0, restore) as log:
        log.write({"step": 0})
        if removed == "folder":
            shutil.rmtree(folder)
        else:
            (folder / "metrics.jsonl").unlink()
        log.write({"step": 1})
        log.write({"step": 2})
    assert [row["step"] for row in read(folder / "metrics.jsonl")] == [1, 2]
    assert caplog.text.count("was removed while the run goes on") == len(calls) == 1
