"""The model as built on whatever ranks there are; called inside the ranks of a pool."""

from __future__ import annotations

import logging
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from sffn_kernels import decode_triton, dispatch

from sffn_dist import model as models
from sffn_dist.checkpoint.reader import Reader
from sffn_dist.checkpoint.run_folder import latest_checkpoint
from sffn_dist.inference.evaluation import evaluate
from sffn_dist.inference.generation import sample
from sffn_dist.parallel import cpu_compat, topology
from sffn_dist.parallel.ledger import Ledger
from sffn_dist.spec import config as configs
from sffn_dist.spec import loading
from sffn_dist.spec import schedule as schedules
from sffn_dist.spec.split_table import model_tensors


def _model(tree: dict[str, Any], *, weights: bool = True) -> tuple[Any, configs.Config, Any]:
    config = loading.from_tree(tree)
    cpu_compat.prepare()
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    ranks = topology.groups(config.parallel.tensor)
    model = models.build(config, "fp32", ranks, guide=schedules.build_schedule(config).guided(0))
    if weights:
        found = latest_checkpoint(Path(config.run.dir)) if config.run.dir else None
        if found:
            Reader(found).load(model, ranks)
        else:
            models.initialise(model, config, ranks)
    return model, config, ranks


def _tokens(config: configs.Config, rows: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, config.model.vocab, (rows, config.model.sequence + 1), generator=generator)


def table_mismatches(tree: dict[str, Any]) -> list[str]:
    """Where the model's parameters differ from the split table, in name, shape or marks."""
    model, config, ranks = _model(tree, weights=False)
    specs, found = model_tensors(config, guide=models.has_guide(model)), dict(model.named_parameters())
    problems = [f"{name} is in one only" for name in specs.keys() ^ found.keys()]
    for name in specs.keys() & found.keys():
        spec, parameter = specs[name], found[name]
        if tuple(parameter.shape) != spec.local_shape(ranks.tensor_parallel_size):
            problems.append(
                f"{name}: {tuple(parameter.shape)}, table {spec.local_shape(ranks.tensor_parallel_size)}"
            )
        if parameter.tensor_model_parallel != (spec.cut is not None):
            problems.append(f"{name}: marked tensor_model_parallel {parameter.tensor_model_parallel}")
        # of what every rank holds, vectors; a replicated factor's gradient is summed by its linear
        split_by_tokens = (
            config.parallel.sequence
            and ranks.tensor_parallel_size > 1
            and spec.cut is None
            and len(spec.shape) == 1
        )
        if bool(getattr(parameter, "sequence_parallel", False)) != split_by_tokens:
            problems.append(f"{name}: marked sequence_parallel {not split_by_tokens}")
    return problems


def traffic(tree: dict[str, Any], guided: bool) -> dict[tuple[str, str, str], tuple[Fraction, Fraction]]:
    """(Elements, bytes) that this rank receives over the tensor-parallel group in one micro-batch, by
    (place, purpose, kind).
    """
    model, config, ranks = _model(tree)
    (models.mix_guide(model, 0.5) if guided else models.unset_guide(model))
    tokens = _tokens(config, config.train.micro_batch_size)
    with Ledger(model, {"tensor": ranks.tensor_group}) as ledger:
        models.token_losses(model, tokens[:, :-1], tokens[:, 1:]).mean().backward()
    return {
        (e.place, e.purpose, e.kind): (e.elements, e.bytes)
        for e in ledger.select(group="tensor")
        if e.elements
    }


def guided_difference(tree: dict[str, Any]) -> tuple[float, float, int]:
    """Largest difference of token losses, guided at step 0 against unguided; the losses' spread; guides
    drawn.
    """
    model, config, _ = _model(tree)
    tokens, clock = _tokens(config, 2), schedules.build_schedule(config)
    models.unset_guide(model)
    plain = models.token_losses(model, tokens[:, :-1], tokens[:, 1:])
    drawn = models.set_guide(model, clock, clock.at(0))
    guided = models.token_losses(model, tokens[:, :-1], tokens[:, 1:])
    return float((plain - guided).abs().max()), float(plain.std()), drawn


def evaluation_and_sample(tree: dict[str, Any], windows: int) -> tuple[float, float, list[int]]:
    """Held-out loss and bits per byte over an odd number of windows, and sampled ids."""
    model, config, ranks = _model(tree)
    models.unset_guide(model)
    held = _tokens(config, windows).numpy()
    text_bytes = int((np.arange(config.model.vocab) % 5 + 1)[held[:, 1:]].sum())
    result = evaluate(model, models.token_losses, held, text_bytes, 2, ranks)
    ids = sample(
        model, models.token_logits, [3, 1, 4], 6, context=config.model.sequence, vocab=config.model.vocab - 1,
        temperature=0.5, seed=9, topology=ranks,
    )  # fmt: skip
    assert model.training
    return result.loss, result.bits_per_byte, ids


def direct_loss(tree: dict[str, Any], windows: int) -> tuple[float, float]:
    """The same by the formula, without the evaluation module."""
    model, config, _ = _model(tree)
    models.unset_guide(model)
    tokens = _tokens(config, windows)
    with torch.no_grad():
        logits = models.token_logits(model, tokens[:, :-1])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), tokens[:, 1:].flatten())
    bits = loss / np.log(2) * tokens[:, 1:].numel() / (tokens[:, 1:] % 5 + 1).sum()
    return float(loss), float(bits)


def weights(tree: dict[str, Any]) -> dict[str, np.ndarray]:
    """The rank's weights as a run of this config starts with them."""
    run = _training().begin(tree)
    return {name: parameter.detach().numpy() for name, parameter in run.model.named_parameters()}


def save_start(tree: dict[str, Any]) -> str:
    """A checkpoint of a few steps' training in run.dir."""
    _training().train(tree, steps=2)
    return tree["run"]["dir"]


def _training() -> Any:
    import importlib.util

    spec = importlib.util.spec_from_file_location(
        "training_cases", Path(__file__).with_name("training_cases.py")
    )
    assert spec is not None
    assert spec.loader is not None
    cases = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(cases)
    return cases


def sample_by(tree: dict[str, Any], setting: str, tokens: int) -> dict[str, Any]:
    """A sample of likeliest ids with kernels of one setting, Triton's in its interpreter: the ids, those of
    unpadded contexts, the kernels of each size that ran, lengths that the model computed, what was logged.
    """
    model, config, ranks = _model(tree)
    models.unset_guide(model)
    launched, lengths, logged, usual = list[str](), list[int](), list[str](), decode_triton.launch

    def seen(kernel: Any, grid: Any, *rest: Any, **more: Any) -> None:
        shapes = [tuple(tensor.shape) for tensor in rest if isinstance(tensor, torch.Tensor)][:2]
        constants = {name: value for name, value in more.items() if not isinstance(value, torch.Tensor)}
        launched.append(f"{kernel.fn.__name__} {shapes} {constants}")
        usual(kernel, grid, *rest, **more)

    def logits(model: Any, batch: torch.Tensor) -> torch.Tensor:
        lengths.append(batch.shape[1])
        return models.token_logits(model, batch)

    handler, logger = logging.Handler(), logging.getLogger("sffn_dist.inference.generation")
    handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    level = logger.level
    try:
        decode_triton.launch = seen
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        with dispatch.using(setting):
            ids = sample(
                model, logits, [3, 1, 4], tokens, context=config.model.sequence, vocab=config.model.vocab,
                temperature=0.0, seed=9, topology=ranks,
            )  # fmt: skip
    finally:
        decode_triton.launch = usual
        logger.removeHandler(handler)
        logger.setLevel(level)
    own, context = [3, 1, 4], config.model.sequence
    with torch.no_grad():
        for _ in range(tokens):
            window = torch.tensor([own[-context:]])
            own.append(int(models.token_logits(model, window)[0, -1].argmax()))
    return {
        "ids": ids,
        "unpadded": own,
        "launched": sorted(set(launched)),
        "lengths": lengths,
        "logged": logged,
    }
