"""Where a run starts: at step 0 from its seed, at step 0 from another model's weights, or after its newest
checkpoint.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sffn_dist import model as models
from sffn_dist.atomic_io import hash_file
from sffn_dist.checkpoint import run_folder
from sffn_dist.checkpoint.manifest import KINDS, TOKENIZER, BrokenCheckpoint, Manifest, UnreadableCheckpoint
from sffn_dist.checkpoint.reader import Reader
from sffn_dist.data.tokenizer import differing_tokens
from sffn_dist.parallel.object_collectives import all_gather_object, broadcast_object
from sffn_dist.parallel.topology import Topology, require_equal
from sffn_dist.spec import loading
from sffn_dist.spec.config import Config, ConfigError
from sffn_dist.spec.schedule import build_schedule
from sffn_dist.spec.split_table import is_guide
from sffn_dist.training import engine_state, phases
from sffn_dist.training.bad_steps import BadSteps
from sffn_dist.training.engine_state import Engine

log = logging.getLogger(__name__)


def latest_good_checkpoint(run_dir: Path, topology: Topology, up_to: int | None = None) -> Manifest | None:
    """The run's newest checkpoint whose content is whole: rank 0 chooses, each rank hashes its share of the
    files. All ranks must call it.

    A damaged one is named in a warning and skipped; where its content is wrong, it is marked in its folder.
    Raises ConfigError if there are checkpoints and none is good. ``up_to``: the last step that it may be of.
    """
    damaged: set[Path] = set()
    while (
        checkpoint := _rank_zero_choice(
            lambda: run_folder.latest_checkpoint(run_dir, damaged, up_to), topology
        )
    ) is not None:
        problems = verify_files(checkpoint, topology)
        if not problems:
            return checkpoint
        damaged.add(checkpoint.folder)
        if topology.is_rank_zero:
            reason = "; ".join(map(str, problems))
            log.warning("checkpoint skipped: %s", reason)
            if not all(isinstance(problem, UnreadableCheckpoint) for problem in problems):
                checkpoint.mark(reason)
    return None


def find_initial_weights(config: Config, topology: Topology) -> Manifest:
    """The checkpoint that ``init_from`` names, the same for all ranks though a run may be writing there;
    raises ConfigError.
    """
    assert config.init_from.path
    source = _rank_zero_choice(
        functools.partial(run_folder.find_checkpoint, "init_from", config.init_from.path), topology
    )
    assert source
    if problems := verify_files(source, topology):
        raise ConfigError([f"init_from = {config.init_from.path!r}: {problem}" for problem in problems])
    return source


def _rank_zero_choice(choose: Callable[[], Manifest | None], topology: Topology) -> Manifest | None:
    """Rank 0's choice, or its ConfigError, on every rank."""
    choice: Manifest | ConfigError | None = None
    if topology.is_rank_zero:
        try:
            choice = choose()
        except ConfigError as error:
            choice = error
    choice = broadcast_object(choice)
    if isinstance(choice, ConfigError):
        raise ConfigError(choice.problems)
    return choice


def verify_files(manifest: Manifest, topology: Topology) -> list[BrokenCheckpoint]:
    """What is wrong with the files' content, found by all ranks together, each a share."""
    problems = manifest.damage(sorted(manifest.files)[topology.rank :: topology.world_size])
    return [problem for of_rank in all_gather_object(problems) for problem in of_rank]


@dataclass(frozen=True)
class Start:
    """Where a run's weights come from: its own ``checkpoint``, another's ``initial_weights``, or the seed
    where both are None.
    """

    checkpoint: Manifest | None = None
    initial_weights: Manifest | None = None

    @property
    def step(self) -> int:
        """The first step to take."""
        return self.checkpoint.step if self.checkpoint else 0

    @property
    def recent_losses(self) -> tuple[float, ...]:
        """The last accepted losses before it."""
        return self.checkpoint.recent_losses if self.checkpoint else ()

    @property
    def from_seed(self) -> bool:
        return self.checkpoint is None and self.initial_weights is None


def find_start(
    config: Config, topology: Topology, tokenizer: Path | None = None, checkpoint: Manifest | None = None
) -> Start:
    """The run's ``checkpoint`` if it has one, else what ``init_from`` names, else the seed.

    All ranks must call it.

    Raises ConfigError where ``init_from`` cannot be used, or learned other token ids than ``tokenizer`` has.
    """
    if checkpoint is not None or not config.init_from.path:
        return Start(checkpoint)
    initial_weights = find_initial_weights(config, topology)
    check_tokenizer(initial_weights, config, tokenizer)
    if config.init_from.optimizer and set(initial_weights.kinds) != set(KINDS):
        rule = f"{initial_weights.folder} holds weights alone, no moments of an optimizer"
        raise ConfigError([f"init_from.optimizer = true: {rule}"])
    return Start(initial_weights=initial_weights)


def continue_data(config: Config, start: Start, data_fingerprint: str) -> Config:
    """The config with the sample that ``init_from.data`` begins with: the one after the last that the initial
    weights were trained on, in the same endless order.

    Raises ConfigError where the order is another one.
    """
    source = start.initial_weights
    if source is None or not config.init_from.data:
        return config
    held = loading.from_tree(source.config)
    samples = {
        "data.source": (data_fingerprint[:12], (source.data_fingerprint or "unknown")[:12]),
        "train.seed": (config.train.seed, held.train.seed),
        "model.sequence": (config.model.sequence, held.model.sequence),
    }
    problems = [
        f"init_from.data = true: {key} is {own} here and {its} in {source.folder}; the order of samples is "
        f"another one"
        for key, (own, its) in samples.items()
        if own != its
    ]
    if problems:
        raise ConfigError(problems)
    new_steps = min(source.step, build_schedule(held).first_pass)
    first = held.init_from.first_sample + new_steps * held.train.global_batch_size
    return config.model_copy(
        update={"init_from": config.init_from.model_copy(update={"first_sample": first})}
    )


def require_equal_records(run_dir: Path, data_fingerprint: str, bad_steps: BadSteps) -> None:
    """What every rank reads for itself from folders that should be the same.

    Raises ConfigError on every rank where it is not.
    """
    checkpoint = run_folder.latest_checkpoint(run_dir)
    require_equal(
        {
            "data fingerprint": data_fingerprint,
            "step of the newest checkpoint": checkpoint.step if checkpoint else None,
            "steps to pass over": sorted(bad_steps.excluded),
        }
    )


def load_state(engine: Engine, config: Config, topology: Topology, start: Start) -> None:
    """Weights, moments and step count of ``start`` into a fresh engine.

    Nothing where they come from the seed. All ranks must call it.

    What a checkpoint gives goes into the optimizer's fp32 weights, once, bit for bit; the model's own are
    made from these. Guides that come with no weights start as their factors' product.
    """
    guides_loaded = False
    if start.checkpoint is not None:
        with _as_config_error("run.dir", config.run.dir):
            Reader(start.checkpoint).restore(engine_state.fragments(engine), topology)
        steps, guide_steps = start.checkpoint.optimizer_steps, start.checkpoint.guide_optimizer_steps
        engine_state.set_step_counts(engine, steps, guide_steps)
        guides_loaded = True
    elif start.initial_weights is not None:
        with _as_config_error("init_from", str(config.init_from.path)):
            guides_loaded = load_weights(engine, config, topology, start.initial_weights)
        if config.init_from.optimizer:
            guide_steps = start.initial_weights.guide_optimizer_steps if guides_loaded else 0
            engine_state.set_step_counts(engine, start.initial_weights.optimizer_steps, guide_steps)
    if not start.from_seed:
        engine_state.update_model_weights(engine)
    if models.has_guide(engine.module) and not guides_loaded:
        phases.start_guides(engine, config, topology)


def check_tokenizer(source: Manifest, config: Config, tokenizer: Path | None) -> None:
    """Refuse a start from weights that learned other token ids, where both tokenizers are known; raises
    ConfigError.
    """
    if (
        tokenizer is None
        or TOKENIZER not in source.files
        or source.files[TOKENIZER].sha256 == hash_file(tokenizer)
    ):
        return
    texts = [path.read_text(encoding="utf-8") for path in (source.folder / TOKENIZER, tokenizer)]
    if differing := differing_tokens(*texts):
        raise ConfigError(
            [
                f"init_from = {config.init_from.path!r}: {len(differing)} tokens have other ids there "
                f"than in the data, "
                f"{differing[0]!r} for one; prepare the data with data.tokenizer={source.folder / TOKENIZER}"
            ]
        )


def load_weights(engine: Engine, config: Config, topology: Topology, source: Manifest) -> bool:
    """Another model's weights (``init_from``), its guides too where both have them: those of an import are
    the dense matrices that it had.

    Returns whether guides were among them.
    """
    reader = Reader(source)
    wanted = (
        fragment for fragment in engine_state.fragments(engine) if reader.guide or not is_guide(fragment.name)
    )
    reader.restore(wanted, topology, kinds=KINDS if config.init_from.optimizer else ("weight",))
    if reader.guide and not models.has_guide(engine.module) and topology.is_rank_zero:
        log.warning(
            "init_from = %r: its guides are left: this run is not guided at its first step",
            config.init_from.path,
        )
    return reader.guide


@contextlib.contextmanager
def _as_config_error(key: str, value: str) -> Iterator[None]:
    """A checkpoint that fails while it is read, because somebody removed it, say, is an input that cannot
    be used.
    """
    try:
        yield
    except BrokenCheckpoint as error:
        raise ConfigError([f"{key} = {value!r}: {error}"]) from None
