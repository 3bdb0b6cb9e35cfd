"""A disk that cannot be written: one line that names the key, the path, the reason and what to do."""

from __future__ import annotations

import errno
import json
import os
import resource
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sffn_dist.data import build, metadata, tokenizer_files
from sffn_dist.data.prepare import prepare
from sffn_dist.spec.config import Config, ConfigError
from sffn_dist.spec.disk_errors import DiskError

PREPARE = """
import json, os, sys
from sffn_dist.spec.loading import from_tree
from sffn_dist.spec.config import ConfigError
from sffn_dist.data.prepare import prepare
try:
    prepare(from_tree(json.loads(sys.argv[1])))
except ConfigError as error:
    print(*error.problems, os.listdir(sys.argv[2]), sep="\\n")
    sys.exit(2)
"""


def _refused(config: Config, mount: str = "", limit: int | None = None) -> list[str]:
    """The problems and what is left in data.dir, of a process that sees the disk that ``mount`` makes."""
    data_dir = Path(config.data.dir)
    data_dir.mkdir(exist_ok=True)
    tree = json.dumps(config.model_dump(mode="json"))
    command = [sys.executable, "-c", PREPARE, tree, str(data_dir)]
    if mount:
        if subprocess.run(["unshare", "-m", "true"], check=False, capture_output=True).returncode:
            pytest.skip("no mount namespace of one's own")
        place = shlex.quote(str(data_dir))
        command = ["unshare", "-m", "sh", "-c", f'{mount.format(place)} && exec "$@"', "sh", *command]

    def limited() -> None:
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=120, preexec_fn=limited
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("mount", "limit", "words"),
    [
        ("mount -t tmpfs -o size=24k tmpfs {}", None, ("No space left on device", "free space there")),
        ("mount -t tmpfs -o ro tmpfs {}", None, ("Read-only file system", "mounted read-only")),
        ("", 4096, ("File too large", "ulimit -f")),
    ],
    ids=["full", "read-only", "limited"],
)
def test_a_disk_that_refuses(
    texts: Path, configure: Callable[..., Config], mount: str, limit: int | None, words: tuple[str, ...]
) -> None:
    config = configure(texts)
    problem, left = _refused(config, mount, limit)
    for part in (f'data.dir = "{config.data.dir}": cannot be used: {config.data.dir}', *words):
        assert part in problem
    assert left == "[]"


@pytest.mark.parametrize(
    ("below", "words"),
    [("file/below", "Not a directory"), ("file", "File exists"), ("n" * 300, "File name too long")],
)
def test_a_place_that_cannot_be(
    texts: Path, tmp_path: Path, configure: Callable[..., Config], below: str, words: str
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=rf'data\.dir = ".*{below}": cannot be used: .*: {words}; '):
        prepare(configure(texts, dir=str(tmp_path / below)))


@pytest.mark.parametrize("number", [errno.EDQUOT, errno.EACCES, errno.EIO], ids=os.strerror)
def test_what_root_does_not_meet(
    texts: Path, configure: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    config = configure(texts)

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number), "train-00000.bin")

    monkeypatch.setattr(build, "balance", refuse)
    with pytest.raises((ConfigError, DiskError)) as caught:
        prepare(config)
    assert str(caught.value).startswith(f'data.dir = "{config.data.dir}": ')
    assert f"train-00000.bin: {os.strerror(number)}; " in str(caught.value)
    # a server that did not answer may answer the next start: exit code 1, and Slurm may requeue
    assert isinstance(caught.value, DiskError) == (number == errno.EIO)
    assert not list(metadata.locate(config).parent.iterdir())


def test_the_source_is_not_taken_for_data_dir(
    texts: Path, configure: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> str:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(tokenizer_files, "hash_file", refuse)
    with pytest.raises(ConfigError, match=r"data\.tokenizer = .*00\.txt: Permission denied; "):
        prepare(configure(texts, tokenizer=str(texts / "00.txt")))
