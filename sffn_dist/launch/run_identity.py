"""Is this the run that ``run.dir`` holds? Compared before anything long starts. Standard library only.

``run.dir/run.json`` records, at the first start, every setting that makes a run what it is
(validation.identity) and the fingerprint of its data. Layout, ZeRO stage, micro batch, recomputation,
precision and logging may change between restarts.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from sffn_dist import atomic_io
from sffn_dist.checkpoint.manifest import missing_tensors
from sffn_dist.checkpoint.run_folder import find_checkpoint
from sffn_dist.spec import config_keys, loading, validation
from sffn_dist.spec.config import Config, ConfigError
from sffn_dist.spec.renamed_keys import translate_flat
from sffn_dist.spec.split_table import model_tensors

NAME = "run.json"


def read_record(run_dir: Path) -> dict[str, Any] | None:
    """What run.dir holds; None if no run has started there.

    Raises ConfigError if the record cannot be read.
    """
    try:
        tree = json.loads((run_dir / NAME).read_text(encoding="utf-8"))
        return {"identity": translate_flat(tree["identity"]), "data_fingerprint": tree["data_fingerprint"]}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        rule = f"its {NAME} is damaged ({error}); put it right, or choose another run.dir"
        raise ConfigError([f"run.dir = {str(run_dir)!r}: {rule}"]) from None


def check_identity(config: Config, data_fingerprint: str | None = None) -> None:
    """Refuse to continue another run; raises ConfigError with each setting that differs.

    ``data_fingerprint`` is compared where both are known.
    """
    run_dir = Path(config.run.dir)
    held = read_record(run_dir)
    if held is None:
        return
    # a key that is newer than the record stands for its default
    own_identity, held["identity"] = validation.identity(config), {**_defaults(config), **held["identity"]}
    problems = [
        f"{key} = {json.dumps(own_identity.get(key))}: run.dir = {str(run_dir)!r} holds a run with "
        f"{json.dumps(held['identity'].get(key))}; "
        "it must stay as it was, or run.dir must name another folder"
        for key in sorted(own_identity.keys() | held["identity"].keys())
        if own_identity.get(key) != held["identity"].get(key)
    ]
    if (
        not problems
        and data_fingerprint
        and held["data_fingerprint"]
        and data_fingerprint != held["data_fingerprint"]
    ):
        problems = [
            f"data.source = {config.data.source!r}: run.dir = {str(run_dir)!r} was trained on other data "
            f"(fingerprint {held['data_fingerprint'][:12]}, now {data_fingerprint[:12]}); use the data it "
            f"had, or another run.dir"
        ]
    if problems:
        raise ConfigError(problems)


def _defaults(config: Config) -> dict[str, Any]:
    return {key: value for key, value in config_keys.defaults().items() if key in validation.identity(config)}


def check_source_of_weights(config: Config) -> None:
    """Refuse an ``init_from`` whose model is another one; raises ConfigError."""
    assert config.init_from
    manifest = find_checkpoint("init_from", config.init_from)
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
        raise ConfigError([f"init_from = {config.init_from!r}: {problem}" for problem in problems])


def write_record(config: Config, data_fingerprint: str) -> None:
    """Record the run in run.dir."""
    tree = {
        "identity": validation.identity(config),
        "data_fingerprint": data_fingerprint,
        "config": config.model_dump(mode="json"),
    }
    atomic_io.write_text(Path(config.run.dir) / NAME, json.dumps(tree, indent=1) + "\n")
