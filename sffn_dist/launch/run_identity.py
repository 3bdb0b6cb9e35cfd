"""Is this the run that ``run.dir`` holds? Compared before anything long starts. Standard library only.

``run.dir/run.json`` records, at the first start, every setting that makes a run what it is
(validation.identity) and the fingerprint of its data. Where that file is missing, the newest checkpoint says
the same. Layout, ZeRO stage, micro batch, recomputation, precision and logging may change between restarts,
and by ``--change`` what run_changes.py allows.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sffn_dist import atomic_io, strict_json
from sffn_dist.checkpoint import run_folder
from sffn_dist.checkpoint.manifest import TOKENIZER, missing_tensors
from sffn_dist.checkpoint.run_folder import find_checkpoint
from sffn_dist.data.sources import source_of
from sffn_dist.data.sources.local import LocalFiles
from sffn_dist.launch import run_changes
from sffn_dist.spec import config_keys, loading, micro_batch, validation
from sffn_dist.spec.changes import CHANGEABLE
from sffn_dist.spec.config import Config, ConfigError
from sffn_dist.spec.config_keys import flatten
from sffn_dist.spec.renamed_keys import translate, translate_flat
from sffn_dist.spec.split_table import model_tensors

NAME = "run.json"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Record:
    """What a run is, by its ``run.json``, or by its newest checkpoint where that file is missing."""

    source: str  # for messages
    identity: dict[str, Any]
    data_fingerprint: str | None
    config: Config | None  # None in records of versions that did not keep it, or that no longer validates
    init_from_fingerprint: str | None = None  # of the weights that the run began with


def read_record(run_dir: Path) -> Record | None:
    """What run.dir holds; None if no run has started there.

    Raises ConfigError if the record cannot be read.
    """
    try:
        tree = strict_json.floats(json.loads((run_dir / NAME).read_text(encoding="utf-8")))
        config = _config(tree.get("config"))
        identity, weights = translate_flat(tree["identity"]), tree.get("init_from_fingerprint")
        return Record(NAME, identity, tree["data_fingerprint"], config, weights)
    except FileNotFoundError:
        return _record_of_checkpoint(run_dir)
    except (OSError, ValueError, KeyError, TypeError) as error:
        rule = f"its {NAME} is damaged ({error}); put it right, or choose another run.dir"
        raise ConfigError([f"run.dir = {str(run_dir)!r}: {rule}"]) from None


def _record_of_checkpoint(run_dir: Path) -> Record | None:
    """Only ``checkpoints/`` may have been copied here: a checkpoint says what it is one of."""
    checkpoint = run_folder.latest_checkpoint(run_dir)
    if checkpoint is None:
        return None
    config = _config(checkpoint.config)
    if config is None:
        rule = f"has no {NAME}, and the config of {checkpoint.folder} cannot be read by this version"
        raise ConfigError([f"run.dir = {str(run_dir)!r}: {rule}"])
    fingerprint = checkpoint.data_fingerprint
    return Record(str(checkpoint.folder), validation.identity(config), fingerprint, config)


def _config(tree: dict[str, Any] | None) -> Config | None:
    if tree is None:
        return None
    try:
        return loading.from_tree(translate(tree))
    except ConfigError:
        return None


def continue_run(config: Config, change: Sequence[str] = ()) -> Config:
    """The config with what the run in run.dir recorded on its way: changes, and where its data began.

    ``change``: the settings of ``--change``. Raises ConfigError.
    """
    record = read_record(Path(config.run.dir))
    if record is None or record.config is None:
        if change and record is None:
            rule = f"run.dir = {config.run.dir!r} holds no run to change; set it without --change"
            raise ConfigError([f"--change {text}: {rule}" for text in change])
        return config
    if config.init_from.data:
        first = record.config.init_from.first_sample
        config = config.model_copy(
            update={"init_from": config.init_from.model_copy(update={"first_sample": first})}
        )
    return run_changes.take_over(config, record.config, change)


def choose_micro_batch(config: Config, target: micro_batch.Target) -> tuple[Config, str]:
    """The config with a number for ``train.micro_batch_size = auto``, and why it is that one ("": was set).

    What the run in run.dir recorded is taken where it divides a rank's share of the global batch. Raises
    ConfigError where nothing fits.
    """
    if config.train.micro_batch_size != "auto":
        return config, ""
    record, share = read_record(Path(config.run.dir)), config.train.global_batch_size // target.data_parallel
    recorded = record.config.train.micro_batch_size if record and record.config else "auto"
    if record and recorded != "auto" and share % recorded == 0:
        return micro_batch.with_size(config, recorded), f"recorded by {record.source}"
    choice = micro_batch.choose(config, target)
    return micro_batch.with_size(config, choice.size), choice.reason


def check_identity(config: Config, data_fingerprint: str | None = None) -> None:
    """Refuse to continue another run; raises ConfigError with each setting that differs.

    ``data_fingerprint`` is compared where both are known.
    """
    run_dir = Path(config.run.dir)
    record = read_record(run_dir)
    if record is None:
        return
    # a key that is newer than the record stands for its default
    held = {**_defaults(config), **record.identity}
    own = validation.identity(config)
    by_content = _keys_by_content(own, record, data_fingerprint)
    if _same_weights(config.init_from.path, record):
        by_content = by_content | {"init_from.path"}
    keys = sorted((own.keys() | held.keys()) - by_content)
    differing = [key for key in keys if own.get(key) != held.get(key)]
    if record.config is not None and len(config.changes) > len(record.config.changes):
        # of the new change; and what follows from it, as the end of a guide that lasts as long as the run
        before, after = flatten(record.config), flatten(config)
        differing = [
            key
            for key in differing
            if key not in config.changes[-1].before and before.get(key) != after.get(key)
        ]
    problems = [_difference(key, own.get(key), held.get(key), run_dir, record) for key in differing]
    problems = problems or list(_foreign_checkpoint(own, run_dir, record))
    if (
        not problems
        and data_fingerprint
        and record.data_fingerprint
        and data_fingerprint != record.data_fingerprint
    ):
        problems = [
            f"data.source = {config.data.source!r}: run.dir = {str(run_dir)!r} was trained on other data "
            f"(fingerprint {record.data_fingerprint[:12]}, now {data_fingerprint[:12]}); use the data it "
            f"had, or another run.dir"
        ]
    if problems:
        raise ConfigError(problems)


def _foreign_checkpoint(own: dict[str, Any], run_dir: Path, record: Record) -> Iterator[str]:
    """The newest checkpoint may have been copied in from another run."""
    checkpoint = run_folder.latest_checkpoint(run_dir) if record.source == NAME else None
    config = _config(checkpoint.config) if checkpoint else None
    if checkpoint is None or config is None:
        return
    its = validation.identity(config)
    for key in sorted(own.keys() & its.keys()):
        if key.startswith(("model.", "ffn.")) and own[key] != its[key]:
            rule = "it is of another run; remove it, or choose another run.dir"
            yield (
                f"{key} = {json.dumps(own[key])}: checkpoint {checkpoint.folder} holds "
                f"{json.dumps(its[key])}: {rule}"
            )
    held_fingerprint = checkpoint.data_fingerprint
    if record.data_fingerprint and held_fingerprint and record.data_fingerprint != held_fingerprint:
        yield (
            f"run.dir = {str(run_dir)!r}: checkpoint {checkpoint.folder} was trained on other data than its "
            f"{NAME} says; remove it, or choose another run.dir"
        )


def _difference(key: str, own: Any, held: Any, run_dir: Path, record: Record) -> str:
    text = f"{key} = {json.dumps(own)}: run.dir = {str(run_dir)!r} holds a run with {json.dumps(held)}"
    if record.source != NAME:
        text += f" (by {record.source}; there is no {NAME})"
    if key in CHANGEABLE:
        return f'{text}; to go on with the new value: --change "{key}={_shell(own)}"'
    return f"{text}; it must stay as it was, or run.dir must name another folder"


def _shell(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _keys_by_content(own: Mapping[str, Any], record: Record, fingerprint: str | None) -> set[str]:
    """Keys that name data: its content decides, not where it lies.

    Before it is prepared, only two paths may turn out to be the same; a run is compared again then.
    """
    if fingerprint and record.data_fingerprint:
        return {"data.source", "data.tokenizer"}
    values = {key: (own.get(key), record.identity.get(key)) for key in ("data.source", "data.tokenizer")}
    local = isinstance(values["data.source"][0], str) and all(
        isinstance(source_of(str(text)), LocalFiles) for text in values["data.source"]
    )
    given = all(text is not None for text in values["data.tokenizer"])
    return ({"data.source"} if local else set()) | ({"data.tokenizer"} if given else set())


def _same_weights(path: str | None, record: Record) -> bool:
    """Whether init_from names what the run began with: in the same place, or moved or copied."""
    held = record.identity.get("init_from.path")
    if not path or not isinstance(held, str):
        return False
    if Path(path).resolve() == Path(held).resolve():
        return True
    return record.init_from_fingerprint is not None and record.init_from_fingerprint == _fingerprint(path)


def _fingerprint(path: str) -> str | None:
    """Of the files of the checkpoint that ``init_from`` names, wherever they lie; None if there is none."""
    try:
        files = find_checkpoint("init_from", path).files
    except ConfigError:
        return None
    lines = "".join(f"{name} {file.sha256}\n" for name, file in sorted(files.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def _defaults(config: Config) -> dict[str, Any]:
    return {key: value for key, value in config_keys.defaults().items() if key in validation.identity(config)}


def check_source_of_weights(config: Config) -> None:
    """Refuse an ``init_from`` whose model is another one, or whose tokenizer nobody names; raises
    ConfigError.
    """
    assert config.init_from.path
    manifest = find_checkpoint("init_from", config.init_from.path)
    if TOKENIZER not in manifest.files and config.data.tokenizer is None:
        source = f"init_from = {config.init_from.path!r}"
        rule = f"must name the tokenizer of {source}, which holds none that can be read"
        raise ConfigError([f"data.tokenizer = null: {rule}"])
    wanted = {name: spec.shape for name, spec in model_tensors(config, guide=False).items()}
    problems = list(itertools.islice(missing_tensors(manifest, wanted), 5))
    # what shapes do not show
    source_identity, own_identity = (
        validation.identity(loading.from_tree(manifest.config)),
        validation.identity(config),
    )
    for key in (
        "heads",
        "kv_heads",
        "norm",
        "norm_epsilon",
        "activation",
        "bias",
        "tie_embeddings",
        "rope_base",
        "vocab_unpadded",
    ):
        key = f"model.{key}"
        if not problems and source_identity[key] != own_identity[key]:
            problems.append(
                f"its {key} is {json.dumps(source_identity[key])}, {json.dumps(own_identity[key])} here"
            )
    if problems:
        raise ConfigError([f"init_from = {config.init_from.path!r}: {problem}" for problem in problems])


def write_record(config: Config, data_fingerprint: str) -> None:
    """Record the run in run.dir."""
    weights = None
    if config.init_from.path:
        with suppress(ConfigError):  # a damaged record is replaced
            record = read_record(Path(config.run.dir))
            weights = record.init_from_fingerprint if record else None
        weights = weights or _fingerprint(config.init_from.path)
    tree = {
        "identity": validation.identity(config),
        "data_fingerprint": data_fingerprint,
        "init_from_fingerprint": weights,
        "config": config.model_dump(mode="json"),
    }
    atomic_io.write_text(Path(config.run.dir) / NAME, strict_json.dumps(tree, indent=1) + "\n")


def restore_record(config: Config, data_fingerprint: str) -> None:
    """Make run.dir and its record anew where they were removed under the running run, and say so.

    ``lock`` and ``heartbeat`` come back by themselves (launch/run_lock.py). Raises OSError.
    """
    run_dir = Path(config.run.dir)
    if (run_dir / NAME).exists():
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    write_record(config, data_fingerprint)
    _log.warning(
        "run.dir = %r: was removed while the run goes on; it is made anew with its %s, but earlier "
        "checkpoints and records are lost",
        config.run.dir,
        NAME,
    )
