"""``train.micro_batch_size = auto`` becomes a number, the same on every rank."""

from __future__ import annotations

import dataclasses
import logging

from sffn_dist.launch import run_identity
from sffn_dist.parallel.object_collectives import all_gather_object
from sffn_dist.parallel.topology import rank_and_world
from sffn_dist.spec import micro_batch
from sffn_dist.spec.config import Config

_log = logging.getLogger(__name__)


def resolve(config: Config) -> Config:
    """The config with the number that run.dir records, or else that fits the device with the least memory.

    All ranks must call it, once the process group is joined. Raises ConfigError where nothing fits.
    """
    if config.train.micro_batch_size != "auto":
        return config
    own = micro_batch.target_of(config, rank_and_world()[1])
    sizes = all_gather_object(own.device_memory)
    least = None if None in sizes else min(sizes)
    config, reason = run_identity.choose_micro_batch(config, dataclasses.replace(own, device_memory=least))
    _log.info("train.micro_batch_size = auto: %d, %s", config.micro_batch_size, reason)
    return config
