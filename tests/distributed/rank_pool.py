"""Ranks that live as long as the test session: rendezvous is paid once, then each case is a function call.

    RankPool        what a test calls: some gloo ranks on this machine
    RankServer      a process that has imported what ranks need, once a session; every rank is a fork of it
    as a script     that process

A rank reads pickled (file, function, arguments) from the socket that asked for it, and answers there.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from sffn_dist.launch.ports import free_port

START_SECONDS = 120.0  # imports on a busy machine


class RankError(AssertionError):
    """A case failed on some rank; holds that rank's traceback."""


class RankServer:
    """Forks ranks; ends with the process that made it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def _start(self) -> None:
        self._address = f"{tempfile.mkdtemp(prefix='ranks-')}/socket"
        self._process = subprocess.Popen(
            [sys.executable, __file__, self._address],
            stdin=subprocess.PIPE,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "CUDA_VISIBLE_DEVICES": "",  # more ranks than devices: gloo on the CPU everywhere
                "PYTHONSAFEPATH": "1",
                "PYTHONWARNINGS": "ignore",
                "TORCH_CPP_LOG_LEVEL": "ERROR",  # as pretrain.py sets it
            },
        )

    def rank(self, place: dict[str, str]) -> Rank:
        """A new process with these variables in its environment."""
        if self._process is None or self._process.poll() is not None:
            self._start()
        connection = socket.socket(socket.AF_UNIX)
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                connection.connect(self._address)
                break
            except OSError:
                assert self._process
                assert self._process.poll() is None, "the server of ranks has ended"
                assert time.monotonic() < deadline, "the server of ranks does not answer"
                time.sleep(0.05)
        return Rank(connection, place)


class Rank:
    """A rank as its pool sees it."""

    def __init__(self, connection: socket.socket, place: dict[str, str]):
        self._connection, self._channel = connection, connection.makefile("rwb")
        self.send(place)
        self.pid = int(self.receive())

    def send(self, message: Any) -> None:
        pickle.dump(message, self._channel)
        self._channel.flush()

    def receive(self) -> Any:
        """Raises EOFError where the rank has ended."""
        return pickle.load(self._channel)

    def close(self) -> None:
        """Nothing more is asked: it ends."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
            self._channel.close()
            self._connection.close()

    def alive(self) -> bool:
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        return True


class RankPool:
    """``world`` gloo ranks on this machine."""

    server = RankServer()  # of the session

    def __init__(self, world: int, timeout: float = 240.0):
        self.world, self.timeout = world, timeout
        self._ranks: list[Rank] = []

    def _start(self) -> None:
        port = free_port()
        for rank in range(self.world):
            place = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": self.world,
                "LOCAL_WORLD_SIZE": self.world,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            self._ranks.append(self.server.rank({key: str(value) for key, value in place.items()}))

    def run(self, file: str | Path, function: str, **arguments: Any) -> list[Any]:
        """``function(**arguments)`` of ``file`` on every rank; the results by rank."""
        if not self._ranks:
            self._start()
        answers: list[Any] = [None] * self.world

        def ask(rank: int) -> None:
            try:
                self._ranks[rank].send((str(file), function, arguments))
                answers[rank] = self._ranks[rank].receive()
            except (EOFError, OSError, ValueError, pickle.UnpicklingError) as error:
                answers[rank] = (False, f"rank {rank} died: {error}")

        threads = [threading.Thread(target=ask, args=(rank,), daemon=True) for rank in range(self.world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            # a rank that failed leaves the others waiting in a collective
            thread.join(10.0 if any(answer and not answer[0] for answer in answers) else self.timeout)
        failures = [
            answer[1] if answer else "no answer in time"
            for answer in answers
            if answer is None or not answer[0]
        ]
        if failures:
            self.stop()
            raise RankError("\n".join(sorted(failures, key=lambda text: text.startswith("no answer"))))
        return [answer[1] for answer in answers]

    def stop(self) -> None:
        """Let ranks end by themselves, which ends the helper processes of libraries too; one that is stuck
        is killed.
        """
        for rank in self._ranks:
            rank.close()
        deadline = time.monotonic() + 5.0
        for rank in self._ranks:
            while rank.alive() and time.monotonic() < deadline:
                time.sleep(0.01)
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank.pid, signal.SIGKILL)
        self._ranks.clear()


# ------------------------------------------------------------------------------------------------- the server


def serve(address: str) -> None:
    """Fork a rank for each connection, until stdin closes; returns in every rank that has ended."""
    import sffn_dist.model
    import sffn_dist.training.loop
    import sffn_dist.training.phases  # noqa: F401  (what most cases need; it starts no thread)

    os.dup2(2, 1)  # what libraries print
    threads = len(os.listdir("/proc/self/task"))
    assert threads == 1, f"{threads} threads, of which a fork has one"
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(64)
        while True:
            ready, _, _ = select.select([0, listener], [], [])
            if listener not in ready:
                return
            connection, _ = listener.accept()
            if os.fork():
                connection.close()
                continue
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listener.close()
            be_rank(connection)
            return


def be_rank(connection: socket.socket) -> None:
    """One rank: answer calls until the pool closes the connection."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    channel = connection.makefile("rwb")
    os.environ.update(pickle.load(channel))
    pickle.dump(os.getpid(), channel)
    channel.flush()
    modules: dict[str, Any] = {}
    while True:
        try:
            file, function, arguments = pickle.load(channel)
        except (EOFError, OSError):
            return
        try:
            if file not in modules:
                spec = importlib.util.spec_from_file_location(Path(file).stem, file)
                assert spec
                assert spec.loader
                modules[file] = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(modules[file])
            answer = (True, getattr(modules[file], function)(**arguments))
        except BaseException:
            answer = (False, f"rank {os.environ['RANK']}:\n{traceback.format_exc()}")
        with contextlib.suppress(OSError):
            pickle.dump(answer, channel)
            channel.flush()


if __name__ == "__main__":
    serve(sys.argv[1])
