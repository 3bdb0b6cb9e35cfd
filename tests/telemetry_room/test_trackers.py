"""Trackers: one W&B run over restarts, readable events, and no failure that stops a run."""

import os
import shutil
import subprocess
import sys

import pytest

from sffn_dist.spec.config import ConfigError, Logging
from sffn_dist.telemetry import trackers
from sffn_dist.telemetry.trackers import Trackers, check_trackers, open_trackers

WANDB = """
import os, signal, sys
from pathlib import Path
from sffn_dist.spec.config import Logging
from sffn_dist.telemetry.events import EventLog
from sffn_dist.telemetry.trackers import open_trackers
run_dir, start, stop = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
tracked = open_trackers(Logging(wandb=True), run_dir, {"train.micro_batch_size": start}, start)
import wandb
assert wandb.run is not None and wandb.run.offline, "no tracker, or not offline"
for step in range(start, stop):
    tracked.log({"step": step, "loss": float("nan")}, step)
tracked.event(EventLog(run_dir / "events.jsonl").write("rolled back", stop, message="it did"))
tracked.rewind(start)
for step in range(start, stop):
    tracked.log({"step": step, "loss": 1.0}, step)  # without a warning for each
count = 1 if start == 0 else 2  # a restart goes on counting
assert wandb.run.summary["events/rolled_back"] == count and wandb.run.summary["events/last"] == "it did"
if start == 0: os.kill(os.getpid(), signal.SIGKILL)
tracked.finish({"heldout_loss": 3.0})
"""


def logged_out(home):
    kept = {key: value for key, value in os.environ.items() if not key.startswith("WANDB") and key != "NETRC"}
    return {**kept, "HOME": str(home)}


def test_wandb_offline_keeps_one_id_over_a_kill_and_its_files_in_the_run_folder(tmp_path):
    pytest.importorskip("wandb")
    run_dir, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    run_dir.mkdir()
    elsewhere.mkdir()
    codes, ids, errors = [], [], ""
    for start, stop in ((0, 5), (3, 6)):
        words = [sys.executable, "-c", WANDB, str(run_dir), str(start), str(stop)]
        with open(
            tmp_path / "errors", "w"
        ) as file:  # no pipe: W&B's own process holds it open when ours is killed
            codes.append(
                subprocess.call(
                    words, env=logged_out(elsewhere), cwd=elsewhere, stdout=file, stderr=file, timeout=120
                )
            )
        ids.append((run_dir / "wandb_id").read_text().strip())
        errors += (tmp_path / "errors").read_text()
    assert codes == [-9, 0], errors
    assert "warn" not in errors.lower(), errors
    assert len(set(ids)) == 1
    files = sorted((run_dir / "wandb").glob("offline-run-*/run-*.wandb"))
    assert [file.name for file in files] == [f"run-{ids[0]}.wandb"] * 2
    assert all(file.stat().st_size > 0 for file in files)
    assert not (elsewhere / "wandb").exists()


def test_logged_in_is_seen_without_asking_anybody(tmp_path):
    pytest.importorskip("wandb")
    code = "from sffn_dist.telemetry.trackers import _wandb_is_logged_out as out; print(out())"
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password " + 40 * "a")
    (tmp_path / "other").write_text("machine example.org login user password secret")
    cases: list[tuple[dict[str, str], str]] = [
        ({}, "True"),
        ({"NETRC": str(tmp_path / "other")}, "True"),
        ({"NETRC": str(tmp_path / "netrc")}, "False"),
        ({"WANDB_API_KEY": 40 * "a"}, "False"),
        ({"WANDB_MODE": "online"}, "False"),
    ]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**logged_out(tmp_path), **more},
            stdout=subprocess.PIPE,
            text=True,
        )
        for more, _ in cases
    ]
    assert [process.communicate(timeout=120)[0].strip() for process in started] == [
        expected for _, expected in cases
    ]


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, stop, loss in ((0, 5, 1.0), (3, 7, 2.0)):
        tracked = open_trackers(Logging(tensorboard=True), tmp_path, {"train.steps": 7}, start)
        for step in range(start, stop):
            tracked.log({"step": step, "loss": loss, "note": "text", "done": True}, step)
        tracked.finish({"heldout_loss": 3.0} if stop == 7 else {})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    expected = [(step, 1.0 if step < 3 else 2.0) for step in range(7)]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == expected
    assert sorted(events.Tags()["scalars"]) == ["done", "loss", "summary/heldout_loss"]


def test_tensorboard_shows_what_a_run_went_back_over_once(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracked = open_trackers(Logging(tensorboard=True), tmp_path, {}, 0)
    for start, stop, loss in ((0, 6, 1.0), (2, 7, 2.0)):
        if start:
            tracked.event({"event": "rolled back", "step": 6, "message": "steps 3 to 5 were bad"})
            tracked.rewind(start)
        for step in range(start, stop):
            tracked.log({"step": step, "loss": loss}, step)
    tracked.finish({})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (s, 1.0 if s < 2 else 2.0) for s in range(7)
    ]
    assert "events/text_summary" in events.Tags()["tensors"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("unwritten", [False, True], ids=["all rows written", "a row not yet written"])
def test_tensorboard_goes_on_where_its_folder_was_removed(tmp_path, caplog, unwritten):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracked = open_trackers(Logging(tensorboard=True), tmp_path / "run", {}, 0)
    for step in range(6):
        if step == 3:
            writer = tracked._trackers[0]._writer
            writer.flush()
            shutil.rmtree(tmp_path / "run")
            if unwritten:  # its thread finds no folder
                writer.add_scalar("loss", 2.5, 2)
        tracked.log({"step": step, "loss": float(step)}, step)
    tracked.finish({})
    assert caplog.text.count("tensorboard was removed while the run goes on") == 1
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [3, 4, 5]


def test_nothing_asked_for_imports_nothing(tmp_path):
    code = (
        "import sys; from pathlib import Path; from sffn_dist.spec.config import Logging; from "
        "sffn_dist.telemetry import trackers\n"
        "trackers.check_trackers(Logging(wandb=True, tensorboard=True))\n"
        "trackers.open_trackers(Logging(), Path('.'), {}, 0).log({}, 0)\n"
        "assert not {'wandb', 'torch', 'tensorboard'} & set(sys.modules)"
    )
    pytest.importorskip("wandb")
    pytest.importorskip("tensorboard")
    subprocess.run([sys.executable, "-c", code], env=logged_out(tmp_path), cwd=tmp_path, check=True)


def test_not_installed_is_refused_even_beside_a_folder_of_that_name(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for name in [name for name in sys.modules if name.split(".")[0] in ("wandb", "tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ConfigError) as refusal:
        check_trackers(Logging(wandb=True, tensorboard=True))
    assert [problem.split(" ")[0] for problem in refusal.value.problems] == [
        "logging.wandb",
        "logging.tensorboard",
    ]
    check_trackers(Logging())


def test_failing_trackers_are_told_once_and_swallowed(tmp_path, monkeypatch, caplog):
    class Broken:
        name = "broken"

        def log(self, row, step):
            raise ConnectionError("gone")

        def finish(self, summary):
            raise RuntimeError("gone too")

    class Counting:
        name, seen = "counting", 0

        def log(self, row, step):
            self.seen += 1

        def finish(self, summary):
            self.seen += 1

    counting = Counting()
    tracked = Trackers([Broken(), counting])
    for step in range(3):
        tracked.log({"loss": 1.0}, step)
    tracked.finish({})
    tracked.finish({})
    assert counting.seen == 4
    assert len(caplog.records) == 1
    assert "broken failed" in caplog.text

    monkeypatch.setattr(trackers, "_Tensorboard", lambda *_: 1 / 0)
    monkeypatch.setattr(trackers, "_installed", lambda _: True)
    open_trackers(Logging(tensorboard=True), tmp_path, {}, 0).log({"loss": 1.0}, 0)
    assert "tensorboard cannot be started" in caplog.text
