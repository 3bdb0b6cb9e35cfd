"""DeepSpeed's universal checkpoint format (0.19): full fp32 weights and moments by name, which any ZeRO stage
and size can load.

    latest_universal                     the newest tag
    <tag>/mp_rank_00_model_states.pt     counters (global_steps, skipped_steps, dp_world_size, mp_world_size);
                                         "module" is not read
          zero_pp_rank_0_mp_rank_00_...  the same, by the name that ZeRO 3 looks for
          zero/optimizer_state.pt        "param_groups", in the optimizer's order; ds_version; for ZeRO 3 also
                                         "optimizer_state_dict": {"state": {0: {"step"}}, "param_groups"}
          zero/<name>/fp32.pt            {"param": tensor,
                      exp_avg.pt          "cat_dim": the axis that tensor-parallel ranks chunk,
                      exp_avg_sq.pt       "param_n_sub_params": 2 where each half is chunked by itself};
                                         of ZeRO 3 the flat tensor alone
                      step.pt            Adam's count (ZeRO 1 and 2, one a parameter group; ZeRO 3 has one
                                         for all)

It is what ``ds_to_universal`` makes of a DeepSpeed checkpoint and ``checkpoint.load_universal`` lets an
engine load. Other cuts than chunks of an axis have no form in it, see :func:`uncut`; and ZeRO 3 loads none
into tensor-parallel ranks.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sffn_dist.atomic_io import sync
from sffn_dist.checkpoint.weights import Weights, finite
from sffn_dist.conversion import inferred_config, pickles
from sffn_dist.parallel.split import shard
from sffn_dist.spec import loading, schedule
from sffn_dist.spec.config import Config, ConfigError
from sffn_dist.spec.renamed_keys import translate
from sffn_dist.spec.split_table import is_guide, model_tensors
from sffn_dist.structured.cut import TensorSpec

FILES = {"weight": "fp32", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
LATEST = "latest_universal"
VERSION = "0.19.0"  # whose form this is; DeepSpeed asks for one and takes any since 0.3.17
MODEL_STATES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
CONFIG = "sffn_dist_config"  # a key of ours among the counters


@dataclass(frozen=True)
class Universal:
    """Weights with the optimiser's state: ``full(name, kind)`` for kind weight, exp_avg or exp_avg_sq.

    ``steps`` are Adam's counts.
    """

    weights: Weights
    full: Callable[[str, str], Tensor]
    steps: Mapping[str, int]


# ---------------------------------------------------------------------------------------------------- writing


def chunks(spec: TensorSpec) -> tuple[int, int]:
    """(axis, sub-parameters): how a checkpoint has DeepSpeed cut a tensor.

    A gated fc1 has two, its halves, along axis 0.
    """
    if spec.cut is None or not spec.cut.axes:
        return 0, 1
    return max(0, spec.partition_dim(1)), 2 if len(spec.cut.view) > len(spec.shape) and spec.cut.view[
        0
    ] == 2 else 1


def chunk(full: Tensor, spec: TensorSpec, tensor: int, rank: int) -> Tensor:
    """What DeepSpeed hands to one of ``tensor`` ranks, flat.

    A tensor of the rank's very shape it hands to all.
    """
    axis, parts = chunks(spec)
    if spec.cut is None:
        return full.flatten()
    return torch.cat([part.chunk(tensor, axis)[rank] for part in full.chunk(parts, axis)], axis).flatten()


def uncut(config: Config, tensor: int, *, guide: bool) -> list[str]:
    """Names of the tensors that DeepSpeed would hand out wrongly to this many tensor-parallel ranks."""
    return [
        name
        for name, spec in model_tensors(config, guide=guide).items()
        if not _alike(_narrowed(spec), tensor)
    ]


def _alike(spec: TensorSpec, tensor: int) -> bool:
    index = torch.arange(spec.numel).view(spec.shape)
    try:
        return all(
            torch.equal(chunk(index, spec, tensor, rank), shard(index, spec, tensor, rank).flatten())
            for rank in range(tensor)
        )
    except (IndexError, ValueError):  # it does not divide
        return False


def _narrowed(spec: TensorSpec) -> TensorSpec:
    """The same cut of a tensor that is 1 wide where it is not cut: what lies where can be tried without
    its memory.
    """
    if spec.cut is None:
        return TensorSpec((1,))
    owners, cut = spec._dim_of_axes(), spec.cut
    kept = {owners[axis] for axis in (*cut.axes, *(() if cut.many is None else (cut.many,)))}
    view = tuple(size if owners[axis] in kept else 1 for axis, size in enumerate(cut.view))
    shape = tuple(size if dim in kept else 1 for dim, size in enumerate(spec.shape))
    return TensorSpec(shape, dataclasses.replace(cut, view=view))


def write(
    weights: Weights,
    moments: Callable[[str, str], Tensor],
    steps: Mapping[str, int],
    folder: Path,
    *,
    tensor: int = 1,
) -> Path:
    """Write ``weights`` and ``moments(name, "exp_avg" | "exp_avg_sq")`` below ``folder``.

    Returns the tag's folder.

    ``steps``: Adam's count of each parameter. Tensors are held one at a time. Raises ConfigError if
    ``tensor`` ranks could not load it.
    """
    if tensor > 1 and (wrong := uncut(weights.config, tensor, guide=weights.guide)):
        raise ConfigError(
            [
                f"{folder}: {tensor} ranks cut {', '.join(wrong[:4])} in a way that a universal checkpoint "
                f"cannot tell"
            ]
        )
    place = folder / f"global_step{weights.step}_universal"
    for name, spec in model_tensors(weights.config, guide=weights.guide).items():
        target = place / "zero" / name
        target.mkdir(parents=True, exist_ok=True)
        axis, parts = chunks(spec)
        split_info = {"cat_dim": axis, **({"param_n_sub_params": parts} if parts > 1 else {})}
        for kind, file in FILES.items():
            full = weights.full(name) if kind == "weight" else moments(name, kind)
            finite(full, f"{kind} of {name}", weights.origin)
            _save({"param": full.contiguous(), **split_info}, target / f"{file}.pt")
        _save(torch.tensor(float(steps[name])), target / "step.pt")
    _save(_optimizer_state(weights, steps), place / "zero" / "optimizer_state.pt")
    for name in MODEL_STATES:
        _save(_counters(weights, steps), place / name)
    (folder / LATEST).write_text(place.name, encoding="utf-8")
    sync(folder / LATEST)
    return place


def _save(value: object, path: Path) -> None:
    try:
        torch.save(value, path)
    except RuntimeError as error:  # what torch's writer raises on a full disk
        raise OSError(f"{path}: {error}") from None
    sync(path)


def _optimizer_state(weights: Weights, steps: Mapping[str, int]) -> dict[str, Any]:
    """One parameter group, and one more of the guides, as the engine has them."""
    train = weights.config.train
    group = {
        "lr": train.learning_rate,
        "betas": (train.beta1, train.beta2),
        "eps": train.epsilon,
        "weight_decay": train.weight_decay,
        "params": [],
    }
    groups = [dict(group) for _ in range(2 if weights.guide else 1)]
    first = next(count for name, count in steps.items() if not is_guide(name))
    return {
        "param_groups": groups,
        "optimizer_state_dict": {"state": {0: {"step": torch.tensor(float(first))}}, "param_groups": groups},
        "ds_version": VERSION,
        "clip_grad": train.clip,
        "overflow": False,
    }


def _counters(weights: Weights, steps: Mapping[str, int]) -> dict[str, Any]:
    return {
        "module": {},
        "optimizer": None,
        "lr_scheduler": None,
        "global_steps": weights.step,
        "global_samples": weights.step * weights.config.train.global_batch_size,
        "skipped_steps": max(0, weights.step - max(steps.values())),
        "dp_world_size": 1,
        "mp_world_size": 1,
        "ds_version": VERSION,
        CONFIG: weights.config.model_dump(mode="json"),
    }


# ---------------------------------------------------------------------------------------------------- reading


def read_weights(folder: Path, overrides: Sequence[str] = ()) -> Weights:
    """The model in a universal checkpoint that was written here."""
    return read(folder).weights


def read(folder: Path, config: Config | None = None) -> Universal:
    """A universal checkpoint: a tag's folder, or one with ``latest_universal``.

    Of one that was not written here ``config`` must be given.

    Raises ConfigError if it is none, or its tensors are not those of the config's model.
    """
    place = _place(folder)
    counters = _counters_in(place)
    if config is None:
        recorded_config = counters.get(CONFIG)
        if not isinstance(recorded_config, dict):
            raise ConfigError([f"{place}: was not written by this project; its config must be given"])
        config = loading.from_tree(translate(recorded_config))
    names = {path.parent.name for path in (place / "zero").glob("*/fp32.pt")}
    guide = any(map(is_guide, names))
    specs = model_tensors(config, guide=guide)
    files = {
        (name, kind): place / "zero" / name / f"{file}.pt" for name in names for kind, file in FILES.items()
    }
    shapes = {
        name: _fitting(files[name, "weight"], specs[name].shape if name in specs else None) for name in names
    }
    problems = inferred_config.mismatches(shapes, {name: spec.shape for name, spec in specs.items()})
    folders = sorted(path.name for path in (place / "zero").iterdir() if path.is_dir())
    bare = [name for name in folders if name not in names and name not in specs]
    problems += [f"zero/{name} has no fp32.pt, and is no tensor of the config's model" for name in bare[:20]]
    if problems:
        raise ConfigError([f"{place}: {problem}" for problem in problems])

    def full(name: str, kind: str) -> Tensor:
        if _fitting(files[name, kind], specs[name].shape) != specs[name].shape:
            raise ConfigError([f"{files[name, kind]}: is not of shape {list(specs[name].shape)}"])
        tensor = pickles.full_precision(_held(files[name, kind])).view(specs[name].shape)
        return finite(tensor, f"{kind} of {name}", str(place))

    common_step = _step_of_all(place)
    steps = {
        name: _count(pickles.load(file))
        if (file := place / "zero" / name / "step.pt").is_file()
        else common_step
        for name in specs
    }
    step = _count(counters.get("global_steps"))
    alpha = schedule.build_schedule(config).alpha(step) if guide else 0.0
    weights = Weights(
        config=config,
        full=partial(full, kind="weight"),
        origin=str(place),
        guide=guide,
        alpha=alpha,
        step=step,
    )
    return Universal(weights, full, steps)


def _place(folder: Path) -> Path:
    if not (folder / LATEST).is_file():
        place = folder
    else:
        try:
            tag = (folder / LATEST).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeError) as error:
            raise ConfigError([f"{folder / LATEST}: cannot be read: {error}"]) from None
        if not re.fullmatch(r"[\w][\w.-]*", tag):
            raise ConfigError([f"{folder / LATEST}: names {tag[:40]!r}, which is no tag"])
        place = folder / tag
    if not (place / "zero").is_dir():
        raise ConfigError([f"{place}: has no folder zero; not a universal checkpoint"])
    return place


def _counters_in(place: Path) -> dict[str, Any]:
    states_file = next((path for name in MODEL_STATES if (path := place / name).is_file()), None)
    states = pickles.load(states_file) if states_file is not None else {}
    return states if isinstance(states, dict) else {}


def _held(path: Path) -> Any:
    """The tensor in a file: alone, or under "param"."""
    held = pickles.load(path)
    return held.get("param") if isinstance(held, dict) else held


def _fitting(path: Path, expected: tuple[int, ...] | None) -> tuple[int, ...]:
    """The shape of the tensor in a file.

    A flat one (ZeRO 3) takes what is expected, if it has as many elements.
    """
    held = _held(path)
    shape = pickles.shape_of(held)
    if shape is None:
        raise ConfigError([f"{path}: holds no tensor of floating-point numbers"])
    if expected is not None and len(shape) == 1 and held.numel() == torch.Size(expected).numel():
        return expected
    return shape


def _step_of_all(place: Path) -> int:
    """Adam's count where it is kept once, by ZeRO 3; 0 if it is not there."""
    path = place / "zero" / "optimizer_state.pt"
    if not path.is_file():
        raise ConfigError([f"{path}: is missing"])
    node: Any = pickles.load(path)
    for key in ("optimizer_state_dict", "state", 0, "step"):
        node = node.get(key) if isinstance(node, dict) else None
    return _count(node)


def _count(value: object) -> int:
    number = (
        float(value)
        if isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1)
        else 0.0
    )
    return int(number) if 0 <= number < 2**53 else 0
