"""Weights & Biases and tensorboard, each only when asked for; neither ever stops a run.

A run is one W&B run over all its restarts: its id is kept in ``run_dir/wandb_id``. Where nobody is logged in,
W&B writes its files offline below ``run_dir/wandb``, for ``wandb sync`` later. Tensorboard's events lie in
``run_dir/tensorboard``. The two libraries are imported when a tracker is opened, not before.
"""

from __future__ import annotations

import netrc
import os
import secrets
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from logging import getLogger
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from sffn_dist.atomic_io import write_text
from sffn_dist.spec.config import ConfigError, Logging
from sffn_dist.telemetry import events

_log = getLogger(__name__)


class Tracker(Protocol):
    """One place that rows go to; may raise whatever it likes."""

    name: str

    def log(self, row: Mapping[str, Any], step: int) -> None: ...

    def event(self, row: Mapping[str, Any]) -> None: ...

    def rewind(self, step: int) -> None: ...

    def finish(self, summary: Mapping[str, Any]) -> None: ...


class Trackers:
    """All trackers of a run. What one of them raises is logged once and swallowed."""

    def __init__(self, trackers: Sequence[Tracker] = ()):
        self._trackers = list(trackers)
        self._warned: set[str] = set()

    def log(self, row: Mapping[str, Any], step: int) -> None:
        """Hand on one row of numbers; ``step`` as in the metrics log (index of the step, rising)."""
        for tracker in self._trackers:
            self._guard(tracker, tracker.log, row, step)

    def event(self, row: Mapping[str, Any]) -> None:
        """Hand on something that happened: a row of events.jsonl."""
        for tracker in self._trackers:
            self._guard(tracker, tracker.event, row)

    def rewind(self, step: int) -> None:
        """The run was rolled back: the rows of ``step`` and later will come again."""
        for tracker in self._trackers:
            self._guard(tracker, tracker.rewind, step)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Hand on the run's final figures and close; later calls do nothing."""
        trackers, self._trackers = self._trackers, []
        for tracker in trackers:
            self._guard(tracker, tracker.finish, summary)

    def _guard(self, tracker: Tracker, call: Callable[..., None], *arguments: Any) -> None:
        try:
            call(*arguments)
        except Exception as error:
            if tracker.name not in self._warned:
                self._warned.add(tracker.name)
                _log.warning(
                    "%s failed, training goes on without its rows: %s: %s",
                    tracker.name,
                    type(error).__name__,
                    error,
                )


def check_trackers(logging: Logging) -> None:
    """Refuse trackers that are not installed, without importing them; raises ConfigError."""
    problems = [
        f"logging.{name} = true: the package {name} is not installed (`pip install {name}`, or set "
        f"logging.{name}=false)"
        for name in ("wandb", "tensorboard")
        if getattr(logging, name) and not _installed(name)
    ]
    if problems:
        raise ConfigError(problems)


def open_trackers(
    logging: Logging, run_dir: Path, config_flat: Mapping[str, Any], resume_step: int
) -> Trackers:
    """Open what ``logging`` asks for; only rank 0 calls this.

    ``resume_step`` is the first step still to be done: tensorboard hides what an earlier process logged from
    there on. Raises ConfigError for a package that is not installed; any other failure is a warning, and the
    run goes on without that tracker.
    """
    check_trackers(logging)
    opened: list[Tracker] = []
    wanted: list[tuple[str, Callable[[], Tracker]]] = []
    if logging.wandb:
        wanted.append(("wandb", lambda: _Wandb(logging.wandb_project, Path(run_dir), config_flat)))
    if logging.tensorboard:
        wanted.append(("tensorboard", lambda: _Tensorboard(Path(run_dir), config_flat, resume_step)))
    for name, build in wanted:
        try:
            opened.append(build())
        except Exception as error:
            _log.warning(
                "%s cannot be started, training goes on without it: %s: %s", name, type(error).__name__, error
            )
    return Trackers(opened)


def _installed(name: str) -> bool:
    try:
        spec = find_spec(name)
    except (ImportError, ValueError):
        return False
    # without an origin it is a mere folder of that name in the working directory, such as the one that W&B
    # itself leaves there
    return spec is not None and spec.origin is not None


# ------------------------------------------------------------------------------------------------------ wandb


class _Wandb:
    name = "wandb"

    def __init__(self, project: str, run_dir: Path, config_flat: Mapping[str, Any]):
        import wandb

        run_id = wandb_id(run_dir)

        def start(mode: Any) -> Any:
            return wandb.init(
                project=project,
                name=run_dir.resolve().name,
                id=run_id,
                resume="allow",
                dir=str(run_dir),
                mode=mode,
                config=dict(config_flat),
                # seconds that the other ranks wait where the server is out of reach
                settings=wandb.Settings(init_timeout=30),
                # a restart may change what does not make another run of it, e.g. micro_batch_size
                allow_val_change=True,
            )

        # those of earlier starts count too: a restart goes on with the numbers that the server has
        events_file = run_dir / "events.jsonl"
        rows = events.read(events_file) if events_file.exists() else []
        self._counts = Counter(str(row.get("event")).replace(" ", "_") for row in rows)
        self._logged = 0
        offline = _wandb_is_logged_out()
        try:
            self._run = start("offline" if offline else None)
        except Exception as error:
            if offline:
                raise
            _log.warning(
                "wandb cannot reach its server, its files are kept offline: %s: %s",
                type(error).__name__,
                error,
            )
            wandb.teardown()  # else the id counts as in use, by the attempt that failed
            self._run = start("offline")

    def log(self, row: Mapping[str, Any], step: int) -> None:
        # steps that a resumed run, or one that was rolled back, repeats are on the server already; it would
        # warn about each
        if step >= max(self._run.starting_step, self._logged):
            self._logged = step
            self._run.log(dict(row), step=step)

    def event(self, row: Mapping[str, Any]) -> None:
        kind = str(row["event"]).replace(" ", "_")
        self._counts[kind] += 1
        self._run.summary.update({f"events/{kind}": self._counts[kind], "events/last": str(row["message"])})

    def rewind(self, step: int) -> None:
        """Nothing to do: W&B takes no step twice, and the server keeps the rows that were undone."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        self._run.summary.update(dict(summary))
        self._run.finish()


def wandb_id(run_dir: Path) -> str:
    """The id of the run's W&B run; made at the first call, then read from ``run_dir/wandb_id``."""
    path = run_dir / "wandb_id"
    try:
        stored_id = path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        stored_id = ""
    if stored_id:
        return stored_id
    new_id = "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))
    write_text(path, new_id + "\n")
    return new_id


def _wandb_is_logged_out() -> bool:
    """True where W&B would ask for a key; without asking, and without a network call.

    A mode that the user set stands.
    """
    import wandb

    settings = wandb.setup().settings
    if os.environ.get("WANDB_MODE") or settings.mode != "online":
        return False
    if settings.api_key or settings.identity_token_file or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return False
    # wandb.login(prompt=False) would show it too, but calls the server; so look where it looks
    hosts = [urlsplit(settings.base_url).netloc]
    if settings.base_url == type(settings).model_fields["base_url"].default:
        hosts.append("api.wandb.ai")  # the public server's entry, also where its address changed
    files = [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
    return not any(_netrc_knows(Path(file).expanduser(), host) for file in files for host in hosts)


def _netrc_knows(path: Path, host: str) -> bool:
    try:
        return bool((netrc.netrc(path).authenticators(host) or ("", "", ""))[2])
    except (OSError, netrc.NetrcParseError):
        return False


# ------------------------------------------------------------------------------------------------ tensorboard


class _Tensorboard:
    name = "tensorboard"

    def __init__(self, run_dir: Path, config_flat: Mapping[str, Any], resume_step: int):
        self._folder = run_dir / "tensorboard"
        self._open(resume_step)
        table = "\n".join(
            ["| key | value |", "|---|---|", *(f"| {key} | {value} |" for key, value in config_flat.items())]
        )
        self._writer.add_text("config", table, resume_step)

        self._step = resume_step

    def log(self, row: Mapping[str, Any], step: int) -> None:
        self._step = step
        self._add(row, step)

    def event(self, row: Mapping[str, Any]) -> None:
        self._reopen_if_removed()
        self._writer.add_text("events", f"{row['event']}: {row['message']}", row["step"])

    def rewind(self, step: int) -> None:
        self._writer.close()
        self._open(step)

    def _open(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self._folder), purge_step=step)

    def _reopen_if_removed(self) -> None:
        """The writer would go on in a file that has no name any more."""
        if next(self._folder.glob("events.out.tfevents.*"), None) is None:
            _log.warning("%s was removed while the run goes on: its rows so far are lost", self._folder)
            with suppress(OSError):  # rows that still waited for the removed file
                self._writer.close()
            self._open(self._step)

    def finish(self, summary: Mapping[str, Any]) -> None:
        self._add({f"summary/{key}": value for key, value in summary.items()}, self._step)
        self._writer.close()

    def _add(self, row: Mapping[str, Any], step: int) -> None:
        self._reopen_if_removed()
        for key, value in row.items():
            if isinstance(value, (int, float)) and key != "step":  # of yes and no, 1 and 0
                self._writer.add_scalar(key, float(value), step)
