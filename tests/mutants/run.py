"""Small faults put into the code one at a time: does a test fail?

    run.py                  all of faults.json
    run.py data parallel    those whose file has one of these words

Each fault is applied in a worktree of the last commit, where the tests that it names must fail; they are run
once without any fault first. Prints a line each, and ends with code 1 if a fault was not seen.

faults.json: ``file``, ``before`` (stands there once), ``after``, ``tests`` (arguments of pytest).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


@contextmanager
def worktree() -> Iterator[Path]:
    """The last commit in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "checkout"
        subprocess.run(["git", "-C", ROOT, "worktree", "add", "--quiet", "--detach", tree], check=True)
        try:
            yield tree
        finally:
            subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", tree], check=True)


def passes(tree: Path, tests: list[str]) -> bool:
    """Whether these tests pass on the code in ``tree``; raises RuntimeError where pytest cannot run them."""
    # before the installed packages, which are the checkout's; tests take the root itself off the path
    packages = tree.parent / "packages"
    packages.mkdir(exist_ok=True)
    for package in ("sffn_dist", "kernels/sffn_kernels", "benchmarks/sffn_bench"):
        link = packages / Path(package).name
        if not link.is_symlink():
            link.symlink_to(tree / package)
    command = [sys.executable, "-m", "pytest", "-x", "--no-header", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(
        command,
        cwd=tree,
        env=os.environ | {"PYTHONPATH": str(packages)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode > 1:
        raise RuntimeError(
            f"{' '.join(tests)}: pytest ended with code {done.returncode}\n{done.stdout[-2000:]}"
        )
    return done.returncode == 0


def main() -> int:
    words, missed = sys.argv[1:], 0
    faults = [
        fault
        for fault in json.loads((HERE / "faults.json").read_text())
        if not words or any(word in fault["file"] for word in words)
    ]
    with worktree() as tree:
        clean = sorted({test for fault in faults for test in fault["tests"] if test.startswith("tests/")})
        if not passes(tree, clean):
            print("the tests fail without a fault")
            return 1
        for number, fault in enumerate(faults, 1):
            path, began = tree / fault["file"], time.monotonic()
            text = path.read_text(encoding="utf-8")
            if text.count(fault["before"]) != 1:
                raise ValueError(f"{fault['file']}: {fault['before']!r} must stand there once")
            path.write_text(text.replace(fault["before"], fault["after"]), encoding="utf-8")
            seen = not passes(tree, fault["tests"])
            path.write_text(text, encoding="utf-8")
            missed += not seen
            seconds = time.monotonic() - began
            state = "seen  " if seen else "MISSED"
            print(f"{number:3} {state} {seconds:5.0f} s  {fault['file']}: {fault['after']}", flush=True)
    print(f"{len(faults) - missed} of {len(faults)} faults seen")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
