"""What an error of a disk means for the user: the key, the path, what the system said, what to do.

Standard library only.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path

from sffn_dist.spec.config import ConfigError

# what may be over at the next start: a disk or a server that does not answer
_PASSING = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO, errno.EINTR, errno.EAGAIN}
_ADVICE = {
    errno.ENOSPC: "free space there, or choose another folder",
    errno.EDQUOT: "the quota is used up: free space there, or choose another folder",
    errno.EFBIG: "a limit on the size of files is in force there (ulimit -f): raise it",
    errno.EROFS: "it is mounted read-only: choose another folder",
    errno.EACCES: "permission is missing: change it, or choose another folder",
    errno.EPERM: "permission is missing: change it, or choose another folder",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOTDIR: "a part of the path is a file: choose another folder",
    errno.EEXIST: "it is a file: choose another folder",
    errno.EISDIR: "it is a folder: choose another name",
    errno.ENOENT: "something on the path is missing: make it, or choose another folder",
    errno.ELOOP: "its links go round in a circle: choose another folder",
    errno.EMFILE: "too many files are open (ulimit -n): raise the limit",
    errno.ENODEV: "choose another folder",
}


class DiskError(RuntimeError):
    """A disk that failed, though nothing is wrong with the input: another start may help. Exit code 1."""

    exit_code = 1  # launch/exit_codes.py FAILED, which stands above this floor


def disk_error(setting: str, path: str | os.PathLike[str], error: OSError) -> ConfigError | DiskError:
    """The error to raise for ``error`` of the file or folder at ``path``, which ``setting`` names.

    ``setting`` is the message's begin, ``key = value``.
    """
    where = os.fspath(error.filename) if isinstance(error.filename, (str, os.PathLike)) else os.fspath(path)
    said = error.strerror or str(error) or type(error).__name__
    if error.errno in _PASSING:
        return DiskError(f"{setting}: {where}: {said}; the disk or its server failed, start again")
    advice = _ADVICE.get(error.errno or 0, "put it right, or choose another folder")
    return ConfigError([f"{setting}: cannot be used: {where}: {said}; {advice}"])


@contextlib.contextmanager
def explained(key: str, value: str | os.PathLike[str]) -> Iterator[None]:
    """Raise ConfigError or DiskError, naming ``key = value``, for every OSError of the block."""
    try:
        yield
    except OSError as error:
        setting = f"{key} = {json.dumps(os.fspath(value))}"
        raise disk_error(setting, Path(value), error) from error
