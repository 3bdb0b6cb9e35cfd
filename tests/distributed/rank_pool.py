"""Ranks that live as long as the test session: imports and rendezvous are paid once, then each case is a
function call.

As a script: one rank, which reads pickled (file, function, arguments) from stdin and answers on its original
stdout.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pickle
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from sffn_dist.launch.environment import free_port


class RankError(AssertionError):
    """A case failed on some rank; holds that rank's traceback."""


class RankPool:
    """``world`` gloo ranks on this machine."""

    def __init__(self, world: int, timeout: float = 240.0):
        self.world, self.timeout = world, timeout
        self._processes: list[subprocess.Popen[bytes]] = []

    def _start(self) -> None:
        port = free_port()
        for rank in range(self.world):
            place = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": self.world,
                "LOCAL_WORLD_SIZE": self.world,
            }
            environment = {
                **os.environ,
                **{key: str(value) for key, value in place.items()},
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
                "CUDA_VISIBLE_DEVICES": "",  # more ranks than devices: gloo on the CPU everywhere
                "PYTHONSAFEPATH": "1",
                "PYTHONWARNINGS": "ignore",
                "TORCH_CPP_LOG_LEVEL": "ERROR",  # as pretrain.py sets it
            }
            self._processes.append(
                subprocess.Popen(
                    [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
                )
            )

    def run(self, file: str | Path, function: str, **arguments: Any) -> list[Any]:
        """``function(**arguments)`` of ``file`` on every rank; the results by rank."""
        if not self._processes:
            self._start()
        answers: list[Any] = [None] * self.world

        def ask(rank: int) -> None:
            process = self._processes[rank]
            assert process.stdin
            assert process.stdout
            try:
                pickle.dump((str(file), function, arguments), process.stdin)
                process.stdin.flush()
                answers[rank] = pickle.load(process.stdout)
            except (EOFError, OSError, pickle.UnpicklingError) as error:
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
        for process in self._processes:
            assert process.stdin
            with contextlib.suppress(OSError):
                process.stdin.close()
        deadline = time.monotonic() + 5.0
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._processes.clear()


def serve() -> None:
    """One rank: answer calls until stdin closes."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    modules: dict[str, Any] = {}
    while True:
        try:
            file, function, arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
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
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    serve()
