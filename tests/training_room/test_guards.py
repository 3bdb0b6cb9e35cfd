"""The run lock and the launcher watch, with real processes, real kills."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from sffn_dist.launch import claim
from sffn_dist.launch.run_lock import RunLock
from sffn_dist.spec.config import ConfigError

# flock as it is where a file system has none, or where it is local to a machine and says yes to everybody
FLOCK = """
import errno, fcntl, os
def flock(file, operation):
    if os.environ["FLOCK"] == "missing":
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
if os.environ.get("FLOCK", "real") != "real":
    fcntl.flock = flock
"""

HOLD = f"""{FLOCK}
import os, sys, time
from pathlib import Path
from sffn_dist.launch.run_lock import RunLock
RunLock(Path(sys.argv[1])).acquire()
if len(sys.argv) > 2:
    child = os.fork() or time.sleep(60)  # a data worker that outlives its rank
    print("child", child)
print("held", flush=True)
time.sleep(60)
"""

# starts the rest of the command line, as a launcher does, and notes what its child returned
LAUNCH = """
import subprocess, sys
from pathlib import Path
code = subprocess.call([sys.executable, *sys.argv[1:]])
Path(__file__).with_suffix(".code").write_text(str(code))
"""

RANK = """
import os, sys, time
from pathlib import Path
assert "torch" not in sys.modules
from sffn_dist.launch.launcher_watch import watch_launcher
from sffn_dist.launch.signals import SignalHandler, StopRequested
signals = SignalHandler()
signals.catch()
assert (watch_launcher(signals.launcher_gone, interval=0.05) is None) == ("LOCAL_RANK" not in os.environ)
assert "torch" not in sys.modules
Path(sys.argv[1]).write_text(str(os.getpid()))
try:
    time.sleep(60)
except StopRequested as stop:
    print(stop, file=sys.stderr, flush=True)
    sys.exit(stop.exit_code)
"""


def environment(**more):
    kept = {key: value for key, value in os.environ.items() if key not in ("LOCAL_RANK", "RANK")}
    return {**kept, **more}


def start(*command, **more):
    return subprocess.Popen(
        [str(word) for word in command], env=environment(**more), text=True, stdout=subprocess.PIPE
    )


def until(true, seconds=15.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if true():
            return True
        time.sleep(0.02)
    return False


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")  # a zombie that nobody reaps is dead as well
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] not in "ZX"


# ------------------------------------------------------------------------------------------------------- lock


@pytest.fixture
def holder(tmp_path, request):
    process = start(sys.executable, "-c", HOLD, tmp_path / "run", *getattr(request, "param", []))
    lines = []
    while "held\n" not in lines:
        line = process.stdout.readline()
        assert line, "the holder ended"
        lines.append(line)
    children = [int(line.split()[1]) for line in lines if line.startswith("child")]
    yield process
    process.kill()
    process.wait()
    process.stdout.close()
    for child in children:
        os.kill(child, signal.SIGKILL)


def test_second_run_is_refused_and_told_who_holds_it(tmp_path, holder):
    for _ in range(2):  # being refused must not harm what the holder wrote
        with pytest.raises(ConfigError) as refusal:
            RunLock(tmp_path / "run").acquire()
        for part in (
            "run.dir",
            str(tmp_path / "run"),
            f"pid {holder.pid} on {os.uname().nodename}",
            "since 2",
        ):
            assert part in str(refusal.value)
    told = json.loads((tmp_path / "run" / "lock").read_text())
    assert set(told) == {"host", "pid", "started", "user", "command"}
    assert told["started"].endswith("+00:00")


RACE = f"""{FLOCK}
import sys, time
from pathlib import Path
from sffn_dist.launch import run_lock
run_lock.PATIENCE = 0.5
print("ready", flush=True)
sys.stdin.readline()
try:
    run_lock.RunLock(Path(sys.argv[1])).acquire()
except run_lock.ConfigError as error:
    print(error, flush=True)
    sys.exit(2)
print("held", flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize("flock", ["real", "missing", "local"])
def test_of_two_that_start_together_one_is_refused(tmp_path, flock):
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACE, tmp_path / "run"],
            env=environment(FLOCK=flock),
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for _ in range(2)
    ]
    assert [racer.stdout.readline() for racer in racers] == ["ready\n"] * 2
    for racer in racers:
        racer.stdin.write("go\n")
        racer.stdin.flush()
    told = {racer.stdout.readline(): racer for racer in racers}
    winner = told.pop("held\n")
    ((message, loser),) = told.items()
    for part in ("run.dir = ", "another run is writing there", f"pid {winner.pid} on ", "last heartbeat"):
        assert part in message
    assert loser.wait(30) == 2
    winner.communicate("end\n", timeout=30)
    assert not (tmp_path / "run" / "heartbeat").exists()  # another machine need not wait
    with RunLock(tmp_path / "run"):
        pass


def far_away(**changes):
    """A holder whose process cannot be looked up from here."""
    return dataclasses.replace(claim.Holder.here(), machine="another machine", host="far", **changes)


@pytest.mark.parametrize("alive", [False, True])
def test_a_holder_of_another_machine_is_watched(tmp_path, monkeypatch, caplog, alive):
    monkeypatch.setattr(claim, "STILL_SECONDS", 1.5)
    heartbeat = tmp_path / "heartbeat"
    heartbeat.write_bytes(far_away().line())
    beating = threading.Event()

    def beat():
        while not beating.wait(0.3):
            os.utime(heartbeat)

    thread = threading.Thread(target=beat)
    began = time.monotonic()
    if alive:
        thread.start()
        try:
            with pytest.raises(ConfigError, match=r"on far, since .*last heartbeat"):
                RunLock(tmp_path).acquire()
        finally:
            beating.set()
            thread.join()
        assert json.loads(heartbeat.read_text())["host"] == "far"
    else:
        with RunLock(tmp_path):
            assert json.loads(heartbeat.read_text())["pid"] == os.getpid()
        assert 1.0 < time.monotonic() - began < 10.0
        assert not list(tmp_path.glob(".*"))
    assert "on far, since" in caplog.text
    assert "waiting: it is replaced once it has been silent for 1.5 s" in caplog.text


def test_of_many_that_find_a_dead_holder_one_replaces_it(tmp_path, monkeypatch):
    for turn in range(20):
        path = tmp_path / f"heartbeat {turn}"
        path.write_bytes(far_away().line())
        os.utime(path, times=(1, 1))
        start_together, winners = threading.Barrier(6), []

        def take(path=path, start_together=start_together, winners=winners):
            one = claim.Claim(path)
            start_together.wait()
            if one.try_take() is None:
                winners.append(one)

        threads = [threading.Thread(target=take) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(winners) == 1
        winners[0].release()
        assert not list(tmp_path.iterdir())


STOPPED = f"""{FLOCK}
import sys, time
from pathlib import Path
from sffn_dist.launch import claim, run_lock
claim.BEAT_SECONDS = 0.1
run_lock.RunLock(Path(sys.argv[1])).acquire()
print("held", flush=True)
time.sleep(60)
"""


def test_a_run_that_was_taken_over_ends(tmp_path):
    process = start(sys.executable, "-c", STOPPED, tmp_path, FLOCK="local")
    assert process.stdout.readline() == "held\n"
    (tmp_path / "part").write_bytes(far_away().line())
    (tmp_path / "part").replace(tmp_path / "heartbeat")
    assert process.wait(20) == 2
    assert json.loads((tmp_path / "heartbeat").read_text())["host"] == "far"


@pytest.mark.parametrize("flock", ["real", "missing"])
def test_lock_and_heartbeat_that_were_removed_come_back(tmp_path, flock):
    run_dir = tmp_path / "run"
    process = start(sys.executable, "-c", STOPPED, run_dir, FLOCK=flock)
    assert process.stdout.readline() == "held\n"
    shutil.rmtree(run_dir)
    assert until((run_dir / "lock").exists)
    before = (run_dir / "heartbeat").stat().st_mtime_ns
    assert until(lambda: (run_dir / "heartbeat").stat().st_mtime_ns > before)
    assert json.loads((run_dir / "lock").read_text())["pid"] == process.pid
    with pytest.raises(ConfigError, match=f"pid {process.pid} on "):
        RunLock(run_dir).acquire()
    process.kill()
    process.wait()


@pytest.mark.parametrize("holder", [[], ["with a forked child"]], indirect=True)
def test_lock_of_a_killed_holder_is_taken_over(tmp_path, holder):
    holder.kill()
    holder.wait()
    with RunLock(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / "lock").read_text())["pid"] == os.getpid()


def test_released_and_not_passed_on_to_commands(tmp_path):
    lock = RunLock(tmp_path)
    lock.acquire()
    command = subprocess.Popen(["sleep", "60"], close_fds=False)
    lock.release()
    with RunLock(tmp_path), pytest.raises(ConfigError):
        RunLock(tmp_path).acquire()
    RunLock(tmp_path).acquire()
    command.kill()
    command.wait()


def test_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "dir" / "lock").mkdir(parents=True)
    for bad in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "dir", Path("/proc/none")):
        with pytest.raises(ConfigError, match=r"run\.dir"):
            RunLock(bad).acquire()


# --------------------------------------------------------------------------------------------------- launcher


class Chain:
    """A chain of launchers above a rank; ``kill`` ends its top."""

    def __init__(self, folder, *paths, shell=False, **more):
        self.folder = folder
        (folder / "rank.py").write_text(RANK)
        for path in paths:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(LAUNCH)
        words = [
            sys.executable,
            *(str(folder / path) for path in paths),
            str(folder / "rank.py"),
            str(folder / "pid"),
        ]
        if shell:
            words = ["bash", "-c", " ".join(words) + "; true"]
        with open(folder / "errors", "w") as errors:
            self.top = subprocess.Popen(words, env=environment(**more), stderr=errors, start_new_session=True)
        assert until(lambda: (folder / "pid").exists() and (folder / "pid").read_text())
        self.rank = int((folder / "pid").read_text())

    def kill(self):
        self.top.kill()
        self.top.wait()

    def end(self):
        with suppress(ProcessLookupError):
            os.killpg(self.top.pid, signal.SIGKILL)
        self.top.wait()

    @property
    def errors(self):
        return (self.folder / "errors").read_text()


@pytest.fixture
def chain(tmp_path):
    made = []

    def make(*paths, **more):
        made.append(Chain(tmp_path, *paths, **more))
        return made[-1]

    yield make
    for one in made:
        one.end()


def test_rank_ends_with_its_parent(chain):
    one = chain("torchrun.py", LOCAL_RANK="3")
    pid = one.top.pid
    one.kill()
    assert until(lambda: not alive(one.rank))
    assert one.errors.startswith(f"stopped by the end of its launcher, pid {pid} ")
    assert one.errors.count("\n") == 1


def test_rank_ends_with_the_deepspeed_command_above_its_launcher(chain, tmp_path):
    one = chain("bin/deepspeed", "deepspeed/launcher/launch.py", LOCAL_RANK="0", RANK="5")
    pid = one.top.pid
    one.kill()
    assert until(lambda: not alive(one.rank))
    assert until((tmp_path / "deepspeed/launcher/launch.code").exists), (
        "launch.py itself goes on until its ranks end"
    )
    assert (tmp_path / "deepspeed/launcher/launch.code").read_text() == "143"
    # the rank's error output is its own: rank 0 speaks for all ranks
    assert one.errors.startswith(f"stopped by the end of its launcher, pid {pid} ")


@pytest.mark.parametrize(
    ("paths", "shell", "local_rank"),
    [
        (["some.py"], False, None),  # no launcher: the parent is whoever started it
        (["bin/deepspeed", "deepspeed/launcher/launch.py"], False, None),
        (["torchrun.py"], True, "0"),  # the user's shell above torchrun
        (
            ["deepspeed/launcher/launch.py"],
            True,
            "0",
        ),  # a shell whose command line names deepspeed, but is not its command
        (
            ["deepspeed_jobs/submit.py", "torchrun.py"],
            False,
            "0",
        ),  # above another launcher nothing is watched
    ],
)
def test_rank_goes_on_without_what_is_no_launcher(chain, paths, shell, local_rank):
    one = chain(*paths, shell=shell, **({"LOCAL_RANK": local_rank} if local_rank else {}))
    one.kill()
    time.sleep(0.5)  # ten polls
    assert alive(one.rank), one.errors
