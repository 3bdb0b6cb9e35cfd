"""Ranks that only watch one another: no model, a real store, real ends.

Called inside the nursery, which forks them.

A scene is what each rank does once all watch, and what somebody does to them from outside. Many are played at
a time: most of their seconds are waiting.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from torch._C._distributed_c10d import TCPStore

from sffn_dist.health import heartbeat, watchdog
from sffn_dist.health.watchdog import Watchdog
from sffn_dist.launch import processes
from sffn_dist.launch.ports import free_port
from sffn_dist.parallel import rendezvous
from sffn_dist.spec.config import ConfigError, Guards

LOST, HANG = {"lost_seconds": 3.0}, {"hang_seconds": 2.0, "lost_seconds": 6.0}
GLOO = "[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1234"


class Scene(NamedTuple):
    """One play."""

    part: Callable[[Watchdog, int], object]  # what a rank does while it is watched
    guards: dict[str, float] = {}
    # from outside, once all watch; yields seconds to wait
    act: Callable[[Stage], Iterator[float]] | None = None
    world: int = 3
    before: Callable[[int], object] = lambda rank: None  # in the rank, first of all
    agent: bool = False  # the store is served by a process beside the ranks, as torchrun's agent does
    run: str = ""  # run.dir, if not the scene's own


class Stage:
    """A scene that is being played: its processes."""

    def __init__(self, scene: Scene, folder: Path):
        self.scene, self.folder = scene, folder
        folder.mkdir()
        self.port = free_port()
        self.agent = _fork(lambda: _serve(self.port)) if scene.agent else 0
        self.pids = [
            _fork(lambda rank=rank: _play_rank(scene, rank, folder, self.port)) for rank in range(scene.world)
        ]
        self.codes: dict[int, int] = {}
        self.ended: dict[int, float] = {}
        self.began = self._next = time.monotonic()
        self._act: Iterator[float] | None = None

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        os.kill(self.pids[rank], number)

    def look(self) -> bool:
        """Go on with it; True once all ranks have ended."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self.codes[rank], self.ended[rank] = os.waitstatus_to_exitcode(status), time.monotonic()
                elif time.monotonic() > self.began + 60.0:
                    self.kill(rank)
        if (
            self._act is None
            and self.scene.act
            and len(list(self.folder.glob("ready_*"))) == self.scene.world
        ):
            self._act = self.scene.act(self)
        if self._act and time.monotonic() >= self._next:
            self._next = time.monotonic() + next(self._act, 1e9)
        return len(self.codes) == self.scene.world

    def outcome(self) -> dict[str, Any]:
        """Codes, what each rank printed, and when it ended."""
        if self.agent:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.agent, signal.SIGKILL)
            os.waitpid(self.agent, 0)
        ranks = range(self.scene.world)
        return {
            "codes": [self.codes[rank] for rank in ranks],
            "printed": [(self.folder / f"rank_{rank}.txt").read_text() for rank in ranks],
            "ended": [self.ended[rank] for rank in ranks],
            "seconds": max(self.ended.values()) - self.began,
        }


def play(folder: str, names: list[str], at_once: int = 5) -> dict[str, dict[str, Any]]:
    """Outcomes by name."""
    waiting, running, outcomes = list(names), {}, {}
    while waiting or running:
        while waiting and len(running) < at_once:
            name = waiting.pop(0)
            running[name] = Stage(SCENES[name], Path(folder) / name)
        for name, stage in list(running.items()):
            if stage.look():
                outcomes[name] = running.pop(name).outcome()
        time.sleep(0.01)
    return outcomes


def _fork(function: Callable[[], object]) -> int:
    child = os.fork()
    if not child:
        try:
            function()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(70)
    return child


def _serve(port: int) -> None:
    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    while store:
        time.sleep(60.0)


def _play_rank(scene: Scene, rank: int, folder: Path, port: int) -> None:
    output = os.open(folder / f"rank_{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115  (buffered, whatever the environment says)
    os.environ.update({"RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    os.environ["SFFN_EXIT_FILE"] = str(folder / "end.json")
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = str(scene.agent)
    scene.before(rank)
    own = Watchdog()
    try:
        store = rendezvous.connect(rank, scene.world, 60.0)
        own.start(store, rank, scene.world, Guards(**scene.guards), Path(scene.run or folder))
        (folder / f"ready_{rank}").touch()
        while len(list(folder.glob("ready_*"))) < scene.world:
            time.sleep(0.01)
        scene.part(own, rank)
        (folder / f"stopped_{rank}").write_text(str(time.monotonic()))
        own.stop()
        code = 0
    except Exception as error:
        code = own.fail(error)
    sys.stdout.flush()
    os._exit(code)


# ------------------------------------------------------------------------------------------------------ parts


def wait() -> None:
    """What a rank does in a collective that never ends."""
    time.sleep(120.0)


def get_on(own: Watchdog, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        own.tick("training", 7)
        time.sleep(0.1)


def until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)


def one_fails(own: Watchdog, rank: int) -> None:
    own.tick("training", 7)
    print(f"rank {rank} printed this")  # and nobody flushes it
    if rank == 2:
        raise ValueError("it is broken")
    wait()


def fails_alone(own: Watchdog, rank: int) -> None:
    raise ValueError("it is broken")


def two_fail(own: Watchdog, rank: int) -> None:
    if rank:
        raise KeyError("both")
    wait()


def refuses(own: Watchdog, rank: int) -> None:
    if rank == 1:
        raise ConfigError(["data.path: is not there", "model.width: is odd"])
    wait()


class Diverged(RuntimeError):
    exit_code = 3
    __module__ = "sffn_dist.cases"


class Library(RuntimeError):
    exit_code = 3


def diverges(own: Watchdog, rank: int) -> None:
    raise Diverged("the loss has left")


def library_fails(own: Watchdog, rank: int) -> None:
    raise Library("of another make")


def consequence(own: Watchdog, rank: int) -> None:
    """Rank 1 is killed; the others' collective tells so at once."""
    if rank == 1:
        wait()
    place = own._heartbeat._places[1]
    until(lambda: processes.process_state(place[1], place[2]) == "gone")
    raise RuntimeError(GLOO)


def no_consequence(own: Watchdog, rank: int) -> None:
    if rank == 1:
        raise RuntimeError(GLOO)
    wait()


def kill(rank: int, number: int = signal.SIGKILL) -> Callable[[Stage], Iterator[float]]:
    def act(stage: Stage) -> Iterator[float]:
        yield 0.3
        stage.kill(rank, number)

    return act


def never_again() -> None:
    time.sleep(120.0)


def hangs(own: Watchdog, rank: int) -> None:
    for step in (5, 6, 7):
        own.tick("training", step)
    if rank == 1:
        never_again()
    own.tick("training", 8)
    wait()


def slows_down(own: Watchdog, rank: int) -> None:
    for seconds in (0.4, 0.4, 2.8, 0.0):
        own.tick("training", 7)
        time.sleep(seconds)


def ends_late(own: Watchdog, rank: int) -> None:
    get_on(own, (0.5, 0.1, 5.0)[rank])


def pause(stage: Stage) -> Iterator[float]:
    """Stop all for longer than a rank may go without a heartbeat or progress, as Ctrl-Z and `scontrol
    suspend` do.
    """
    for rank in range(stage.scene.world):
        stage.kill(rank, signal.SIGSTOP)
    yield 4.0
    for rank in range(stage.scene.world):
        stage.kill(rank, signal.SIGCONT)


def pause_one(stage: Stage) -> Iterator[float]:
    stage.kill(1, signal.SIGSTOP)
    yield 4.0
    stage.kill(1, signal.SIGCONT)


def mutex() -> Any:
    """A locked one, to lock again: C code that no signal interrupts."""
    made = ctypes.create_string_buffer(64)
    ctypes.CDLL(None).pthread_mutex_lock(made)
    return made


def is_asked(own: Watchdog, rank: int) -> None:
    """The main thread is in C, where no handler of Python's runs, until the stacks are there."""
    held = mutex()
    stacks = lambda: list(own._run_dir.glob("stacks/*/rank_00001.txt"))  # noqa: E731

    def free() -> None:
        until(stacks)
        ctypes.CDLL(None).pthread_mutex_unlock(held)

    threading.Thread(target=free).start()
    if rank == 1:
        ctypes.CDLL(None).pthread_mutex_lock(held)
    until(stacks)
    time.sleep(1.0)


def many_files(rank: int) -> None:
    """As many as the server of a store for a thousand ranks has."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (1300, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    for _ in range(1100):
        os.dup(0)


def keep_interpreter(own: Watchdog, rank: int) -> None:
    own.tick("training", 7)
    until(lambda: own._armed > 0)
    ctypes.PyDLL(None).pthread_mutex_lock(mutex())


def short_fuse(rank: int) -> None:
    watchdog.REARM, watchdog.BEYOND = 0.2, 1.0


def short_wait(rank: int) -> None:
    watchdog.EXPLANATION_SECONDS = 0.5


def stumble(rank: int) -> None:
    """The first looks fail."""
    usual, calls = heartbeat.process_state, []

    def state(pid: int, started: str) -> str | None:
        if len(calls) < 4 and threading.current_thread().name == "watchdog":
            calls.append(pid)
            raise KeyError("no such thing")
        return usual(pid, started)

    heartbeat.process_state = state


def stumble_over_stacks(rank: int) -> None:
    def dump(self: Watchdog, folder: Path) -> None:
        raise ValueError("no such thing")

    Watchdog.dump_stacks = dump


def full_pipe(own: Watchdog, rank: int) -> None:
    """Rank 1 prints to a pipe that nobody reads: the main thread holds the stream's lock for ever."""
    own.tick("training", 7)
    own.tick("training", 7)
    if rank == 1:
        os.dup2(os.pipe()[1], 1)
        while True:
            print("x" * 10_000, flush=True)
    wait()


def closed_pipe(own: Watchdog, rank: int) -> None:
    if rank == 1:
        reading, writing = os.pipe()
        os.close(reading)
        os.dup2(writing, 1)
        print("for nobody")
        raise ValueError("told all the same")
    wait()


def end_agent(stage: Stage) -> Iterator[float]:
    os.kill(stage.agent, signal.SIGKILL)
    yield 1e9


def first_is_left(own: Watchdog, rank: int) -> None:
    if rank == 0:
        wait()


def end_agent_late(stage: Stage) -> Iterator[float]:
    while 1 not in stage.codes:
        yield 0.05
    os.kill(stage.agent, signal.SIGKILL)


def own_nodes(rank: int) -> None:
    """Each rank on a machine of its own: nobody sees the others' processes."""
    platform.node = lambda: f"node{rank}"


def remote_hang(own: Watchdog, rank: int) -> None:
    """Rank 2 is behind; rank 1, which needs to hear of nobody but rank 0, is the first to have waited too
    long.
    """
    for step in (5, 6, 7):
        own.tick("training", step)
    if rank != 1:
        time.sleep(0.6)
    if rank != 2:
        own.tick("training", 8)
    if rank == 0:
        time.sleep(0.5)
        own.tick("training", 8)
    wait()


def last_fails(own: Watchdog, rank: int) -> None:
    """Rank 0 and 1 are done, and rank 0 waits for the others; rank 2 fails."""
    if rank == 2:
        until(lambda: own._heartbeat._done(0))
        raise ValueError("at the very end")


def last_waits(own: Watchdog, rank: int) -> None:
    if rank == 2:
        wait()


def kill_last(stage: Stage) -> Iterator[float]:
    while not (stage.folder / "stopped_0").exists():
        yield 0.05
    yield 1.0
    stage.kill(2)


def outlives_store(own: Watchdog, rank: int) -> None:
    """Rank 0 has waited for the others for its minute, and goes; rank 2 is not done."""
    if rank == 0:
        usual = own._heartbeat.stop
        own._heartbeat.stop = lambda: usual(1.0)
    if rank == 2:
        get_on(own, 4.0)


SCENES = {
    "ends": Scene(ends_late, LOST),
    "one_fails": Scene(one_fails),
    "two_fail": Scene(two_fail),
    "consequence": Scene(consequence, act=kill(1)),
    "no_consequence": Scene(no_consequence, {"lost_seconds": 1.5, "hang_seconds": 0}, before=short_wait),
    "first_killed": Scene(lambda own, rank: wait(), act=kill(0)),
    "stopped": Scene(lambda own, rank: wait(), LOST, act=kill(1, signal.SIGSTOP)),
    "hangs": Scene(hangs, HANG),
    "slows_down": Scene(slows_down, HANG),
    "off": Scene(lambda own, rank: time.sleep(5.0), {"lost_seconds": 0, "hang_seconds": 0}, act=pause_one),
    "refuses": Scene(refuses),
    "diverges": Scene(diverges),
    "library_fails": Scene(library_fails, world=1),
    "asked": Scene(is_asked, act=kill(1, signal.SIGUSR2), before=many_files),
    "interpreter_kept": Scene(keep_interpreter, {"hang_seconds": 0.5}, before=short_fuse, world=1),
    "paused": Scene(lambda own, rank: get_on(own, 5.5), HANG | LOST, act=pause),
    "stumbles": Scene(lambda own, rank: wait(), LOST, before=stumble, act=kill(1)),
    "no_stacks": Scene(hangs, HANG, before=stumble_over_stacks),
    "full_pipe": Scene(full_pipe, HANG),
    "closed_pipe": Scene(closed_pipe),
    "agent_ends": Scene(lambda own, rank: wait(), agent=True, act=end_agent),
    "agent_ends_late": Scene(first_is_left, {"lost_seconds": 2.0}, world=2, agent=True, act=end_agent_late),
    "no_folder": Scene(hangs, HANG, run="/dev/null/none"),
    "remote_hang": Scene(remote_hang, HANG, before=own_nodes),
    "remote_killed": Scene(lambda own, rank: wait(), LOST, before=own_nodes, act=kill(2)),
    "last_fails": Scene(last_fails),
    "last_killed": Scene(last_waits, act=kill_last),
    "outlives_store": Scene(outlives_store, LOST),
    "alone": Scene(fails_alone, world=1),
    "alone_hangs": Scene(hangs, HANG, world=1),
}


def places(own: int) -> list[str]:
    """Which of some places a rank on this machine takes for a process that it can see: here, elsewhere,
    gone, another's number.
    """
    line = heartbeat.Heartbeat.__new__(heartbeat.Heartbeat)
    line.host = "here"
    began = processes.start_time(own)
    child = _fork(lambda: None)
    until(lambda: ") Z " in Path(f"/proc/{child}/stat").read_text())
    asked = [
        ("here", own, began),
        ("there", own, began),
        ("here", child, processes.start_time(child)),
        ("here", own, "1"),
        ("here", own, ""),
    ]
    seen = [line._visible(*place)[2] for place in asked]
    os.waitpid(child, 0)
    return [
        *seen,
        processes.process_state(child, "1"),
        processes.process_state(own, "1"),
        processes.process_state(own, ""),
        processes.process_state(own, began),
    ]
