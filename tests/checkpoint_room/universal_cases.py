"""DeepSpeed's universal checkpoints, to a real engine and from one; called inside the ranks of a pool."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sffn_dist.checkpoint.manifest import KINDS, Manifest
from sffn_dist.checkpoint.reader import Reader
from sffn_dist.checkpoint.run_folder import latest_checkpoint
from sffn_dist.conversion import deepspeed, universal
from sffn_dist.conversion.verification import differences
from sffn_dist.spec.split_table import is_guide, model_tensors
from sffn_dist.training import engine as engines
from sffn_dist.training import engine_state, phases


def _training() -> Any:
    spec = importlib.util.spec_from_file_location(
        "training_cases", Path(__file__).parents[1] / "distributed" / "training_cases.py"
    )
    assert spec is not None
    assert spec.loader is not None
    cases = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(cases)
    return cases


def _trained(tree: dict[str, Any], steps: int) -> tuple[Any, Manifest, Reader, dict[str, int]]:
    """A run after some steps; its state as our checkpoint has it."""
    run = _training().begin(tree)
    for _ in range(steps):
        _training().take(run)
        phases.enter(run)
    _training().save(run)
    manifest = latest_checkpoint(Path(run.config.run.dir))
    assert manifest is not None
    reader, guided = Reader(manifest), run.schedule.guided(run.step)
    plain, guides = manifest.optimizer_steps, manifest.guide_optimizer_steps
    counts = {
        name: int((guides if is_guide(name) else plain) or 0)
        for name in model_tensors(run.config, guide=guided)
    }
    return run, manifest, reader, counts


def there(tree: dict[str, Any], folder: str, steps: int, more: int) -> dict[str, Any]:
    """What we wrote, in a new engine by load_universal: its state and next losses, and those of the run
    that it was written of.
    """
    cases = _training()
    run, manifest, _, counts = _trained(tree, steps)
    if run.topology.is_rank_zero:
        universal.to_universal(manifest, Path(folder), tensor=run.topology.tensor_parallel_size)
    dist.barrier()
    expected = {"state": cases.state_digests(run.engine), "losses": [cases.take(run)[0] for _ in range(more)]}
    engines.destroy(run.engine)

    other = cases.begin({**tree, "run": {"dir": ""}})
    other.step = steps
    phases.enter(other)  # has a guide where the run has one
    before = cases.state_digests(other.engine)
    other.engine._config.load_universal_checkpoint = True
    loaded, _ = other.engine.load_checkpoint(folder)
    assert loaded is not None
    assert other.engine.global_steps == steps
    got = {
        "state": cases.state_digests(other.engine),
        "steps": engine_state.step_counts(other.engine),
        "counts": counts,
    }
    got["losses"] = [cases.take(other)[0] for _ in range(more)]
    engines.destroy(other.engine)
    return {"expected": expected, "got": got, "before": before}


def back(tree: dict[str, Any], folder: str, steps: int) -> dict[str, float]:
    """Largest differences of what DeepSpeed's own converter wrote, as read here, by kind; "steps": of
    Adam's counts.
    """
    from deepspeed.checkpoint import ds_to_universal

    run, manifest, reader, counts = _trained(tree, steps)
    # Megatron's modules have an empty _extra_state each, on which the converter stumbles
    run.engine.module.register_state_dict_post_hook(
        lambda module, tensors, prefix, metadata: (
            [tensors.pop(key) for key in list(tensors) if tensors[key] is None] and None
        )
    )
    run.engine.save_checkpoint(folder, tag="own")
    target = Path(folder) / "universal"
    ds_to_universal.main(
        argparse.Namespace(
            input_folder=f"{folder}/own", output_folder=str(target), num_extract_workers=1,
            num_merge_workers=1, keep_temp_folder=False, strict=True, inject_missing_state=True,
        )
    )  # fmt: skip
    engines.destroy(run.engine)
    found = deepspeed.read(target, run.config)
    names = list(reader.specs)
    assert found.weights.names() == names
    made = universal.from_universal(target, Path(folder) / "back", run.config)
    assert (made.step, made.optimizer_steps) == (manifest.step, manifest.optimizer_steps)
    assert made.guide_optimizer_steps == manifest.guide_optimizer_steps
    assert list(differences(made, manifest)) == []
    worst = dict.fromkeys(KINDS, 0.0)
    for name in names:
        for kind in KINDS:
            worst[kind] = max(
                worst[kind], float((found.full(name, kind) - reader.full(name, kind)).abs().max())
            )
    worst["steps"] = float(max(abs(found.steps[name] - counts[name]) for name in counts))
    worst["step"] = float(abs(found.weights.step - run.step))
    worst["size"] = float(sum(torch.count_nonzero(reader.full(name, "exp_avg_sq")) for name in names))
    return worst
