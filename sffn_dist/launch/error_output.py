"""Errors of a command line, as every command of the package prints them."""

from __future__ import annotations

import sys
from collections.abc import Iterable


def print_errors(program: str, problems: Iterable[object]) -> None:
    """``program: error: problem``, a line each, to standard error."""
    for problem in problems:
        print(f"{program}: error: {problem}", file=sys.stderr)
    sys.stderr.flush()
