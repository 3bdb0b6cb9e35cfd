"""What is refused before a run starts, by pretrain.py, by tools/submit.py and by tools/compare.py.

Imports no torch.
"""

from __future__ import annotations

from pathlib import Path

from sffn_dist.checkpoint import run_folder
from sffn_dist.data import meta_file, metadata
from sffn_dist.data.overview import resolve_prepared
from sffn_dist.launch import run_identity
from sffn_dist.spec import machine, validation
from sffn_dist.spec.config import Config, ConfigError
from sffn_dist.telemetry.trackers import check_trackers


def check_run(config: Config, ranks: int, *, starts: bool = True) -> None:
    """Everything between a config and its surroundings that is cheap to see and the same on every machine;
    raises ConfigError.

    ``starts``: the run is to be started, not only planned, so run.dir must hold no other one.
    """
    validation.check_world(config, ranks)
    metadata.check_source(config.data, config.vocab_unpadded)
    check_trackers(config.logging)
    config = resolve_prepared(config)
    if starts and config.train.steps:  # else train.epochs, of a run.dir where nothing was trained yet
        prepared = metadata.locate(config)
        fingerprint = meta_file.read_meta(prepared).fingerprint if meta_file.is_usable(prepared) else None
        run_identity.check_identity(config, fingerprint)
    if config.init_from.path and run_folder.latest_checkpoint(Path(config.run.dir)) is None:
        run_identity.check_source_of_weights(config)


def check_machine(config: Config) -> None:
    """What this machine lacks for the run, and what the precision that it takes does not have; raises
    ConfigError.
    """
    if machine.is_rocm():
        raise ConfigError(
            ["torch is a ROCm build: this runs on CUDA devices and CPUs; install a build for one of them"]
        )
    validation.check_precision(config, machine.precision(config.precision))
    reason = machine.triton_unavailable() if config.kernels == "triton" else None
    if reason:
        raise ConfigError([f"kernels = triton: {reason}"])
