"""A run that a job will train: its arguments, where it writes, and whether it can start at all. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sffn_dist import reading, rules
from sffn_dist.checkpoint import manifest
from sffn_dist.config import Config
from sffn_dist.data import store
from sffn_dist.telemetry.trackers import check_trackers
from sffn_dist.training import identity


@dataclass(frozen=True)
class Run:
    """One run of pretrain.py. ``name`` is for people; ``file`` and ``run_dir`` are as the user wrote them."""

    name: str
    file: str
    overrides: tuple[str, ...]
    config: Config

    @property
    def run_dir(self) -> str:
        return str(self.config.run.dir)

    @property
    def arguments(self) -> list[str]:
        """Of pretrain.py; the config's path is absolute, for a job may start elsewhere."""
        return ["--config", str(Path(self.file).absolute()), *self.overrides]

    @property
    def folders(self) -> list[str]:
        """Paths that the run reads and writes, of those that are folders or files."""
        config = self.config
        paths = [self.run_dir, config.data.dir, config.data.tokenizer, config.init_from, str(Path(self.file).absolute().parent)]
        if config.data.source != "stdlib" and not config.data.source.startswith("hf:"):
            paths.append(config.data.source)
        return [path for path in paths if path]


def read(name: str, file: str, overrides: Sequence[str]) -> Run:
    """Load a run's config; raises ConfigError."""
    return Run(name, file, tuple(overrides), reading.load(file, overrides))


def check(config: Config, world: int) -> None:
    """What pretrain.py refuses before it imports torch, as far as it is the same on every machine; raises ConfigError.

    A job may wait for days: what can be seen now is said now.
    """
    rules.check_world(config, world)
    store.check_source(config.data, config.model.vocab)
    check_trackers(config.logging)
    prepared = store.locate(config)
    identity.check(config, store.read_meta(prepared).fingerprint if store.is_usable(prepared) else None)
    if config.init_from and manifest.newest(Path(config.run.dir)) is None:
        identity.check_source_of_weights(config)
