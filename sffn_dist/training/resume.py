"""Where a run starts: at step 0 from its seed, at step 0 from another model's weights, or after its newest checkpoint."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

from sffn_dist import model as models
from sffn_dist.atomic_io import hash_file
from sffn_dist.checkpoint import manifest as manifests
from sffn_dist.checkpoint.manifest import TOKENIZER, BrokenCheckpoint, Manifest, UnreadableCheckpoint
from sffn_dist.checkpoint.reader import Reader
from sffn_dist.data.tokenizer import differing_tokens
from sffn_dist.parallel.object_collectives import all_gather_object, broadcast_object
from sffn_dist.parallel.topology import Topology
from sffn_dist.spec.config import Config, ConfigError
from sffn_dist.spec.split_table import is_guide
from sffn_dist.training import engine as engines
from sffn_dist.training import engine_state, phases
from sffn_dist.training.run import Run

log = logging.getLogger(__name__)


def newest(run_dir: Path, topology: Topology, up_to: int | None = None) -> Manifest | None:
    """The run's newest checkpoint whose content is whole: rank 0 chooses, each rank hashes its share of the files. All ranks must call it.

    A damaged one is named in a warning and skipped; where its content is wrong, it is marked in its folder. Raises ConfigError if there
    are checkpoints and none is good. ``up_to``: the last step that it may be of.
    """
    damaged: set[Path] = set()
    while (found := _rank_zero_choice(lambda: manifests.latest_checkpoint(run_dir, damaged, up_to), topology)) is not None:
        problems = verify_files(found, topology)
        if not problems:
            return found
        damaged.add(found.folder)
        if topology.main:
            reason = "; ".join(map(str, problems))
            log.warning("checkpoint skipped: %s", reason)
            if not all(isinstance(problem, UnreadableCheckpoint) for problem in problems):
                found.mark(reason)
    return None


def find_initial_weights(config: Config, topology: Topology) -> Manifest:
    """The checkpoint that ``init_from`` names, the same for all ranks though a run may be writing there; raises ConfigError."""
    assert config.init_from
    source = _rank_zero_choice(functools.partial(manifests.find_checkpoint, "init_from", config.init_from), topology)
    assert source
    if problems := verify_files(source, topology):
        raise ConfigError([f"init_from = {config.init_from!r}: {problem}" for problem in problems])
    return source


def _rank_zero_choice(choose: Callable[[], Manifest | None], topology: Topology) -> Manifest | None:
    """Rank 0's choice, or its ConfigError, on every rank."""
    choice: Manifest | ConfigError | None = None
    if topology.main:
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
    problems = manifest.damage(sorted(manifest.files)[topology.rank :: topology.world])
    return [problem for of_rank in all_gather_object(problems) for problem in of_rank]


def start(run: Run, found: Manifest | None) -> None:
    """Give the run its engine, in the phase of its first step, and its weights, moments and step: those of ``found``, or of a start.

    What a checkpoint gives goes into the optimiser's fp32 weights, once, bit for bit; the model's own are made from these.
    """
    config, topology = run.config, run.topology
    source = find_initial_weights(config, topology) if found is None and config.init_from else None
    if source is not None:
        check_tokenizer(source, run)
    run.step = found.step if found else 0
    run.bad_steps.begin(found.recent_losses if found else ())
    model = models.build(config, run.precision, topology, guide=run.schedule.guided(run.step))
    if found is None and source is None:
        models.initialise(model, config, topology)
    run.engine = engines.create(model, config, run.precision, topology)
    if found is not None:
        with _as_config_error("run.dir", config.run.dir):
            Reader(found).restore(engine_state.fragments(run.engine), topology)
        engine_state.set_step_counts(run.engine, found.optimizer_steps, found.guide_optimizer_steps)
    with_guides = found is not None
    if source is not None:
        with _as_config_error("init_from", str(config.init_from)):
            with_guides = start_from(run, source)
    if found is not None or source is not None:
        engine_state.update_model_weights(run.engine)
    if models.has_guide(run.model) and not with_guides:
        phases.start_guides(run)


def check_tokenizer(source: Manifest, run: Run) -> None:
    """Refuse a start from weights that learned other token ids, where both tokenizers are known; raises ConfigError."""
    here = run.saver.tokenizer
    if here is None or TOKENIZER not in source.files or source.files[TOKENIZER].sha256 == hash_file(here):
        return
    texts = [path.read_text(encoding="utf-8") for path in (source.folder / TOKENIZER, here)]
    if differing := differing_tokens(*texts):
        raise ConfigError(
            [
                f"init_from = {run.config.init_from!r}: {len(differing)} tokens have other ids there than in the data, {differing[0]!r} "
                f"for one; prepare the data with data.tokenizer={source.folder / TOKENIZER}"
            ]
        )


def start_from(run: Run, source: Manifest) -> bool:
    """Another model's weights (``init_from``), its guides too where both have them: those of an import are the dense matrices that it had.

    Returns whether guides were among them.
    """
    reader = Reader(source)
    wanted = (fragment for fragment in engine_state.fragments(run.engine) if reader.guide or not is_guide(fragment.name))
    reader.restore(wanted, run.topology, kinds=("weight",))
    if reader.guide and not models.has_guide(run.model) and run.topology.main:
        log.warning("init_from = %r: its guides are left: this run is not guided at its first step", run.config.init_from)
    return reader.guide


@contextlib.contextmanager
def _as_config_error(key: str, value: str) -> Iterator[None]:
    """A checkpoint that fails while it is read, because somebody removed it, say, is an input that cannot be used."""
    try:
        yield
    except BrokenCheckpoint as error:
        raise ConfigError([f"{key} = {value!r}: {error}"]) from None
