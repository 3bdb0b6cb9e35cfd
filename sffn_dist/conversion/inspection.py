"""What lies in a checkpoint: what it is, its phase and step, parameters by part, splits, spectrum of each
structure, integrity.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sffn_dist.checkpoint.manifest import Manifest
from sffn_dist.checkpoint.reader import Reader
from sffn_dist.checkpoint.weights import Weights, merged
from sffn_dist.spec import counts, schedule
from sffn_dist.spec.config import Config
from sffn_dist.spec.split_table import ffn_linears, ffn_structure, layer_tensors


@dataclass(frozen=True)
class Spectrum:
    """Singular values s of a linear's matrix (outputs, inputs), with the guide where there is one.

    stable_rank = sum s^2 / max s^2; effective_rank = exp of the entropy of s^2 / sum s^2. Both are at most
    ``bound``, the highest rank that the structure can have.
    """

    layer: int
    linear: str
    kind: str
    bound: int
    largest: float
    smallest: float  # of the ``bound`` largest ones
    stable_rank: float
    effective_rank: float


def describe(manifest: Manifest, *, spectra: bool = True, integrity: bool = True) -> dict[str, Any]:
    """All of it as one tree; of a damaged checkpoint what the manifest states and the damage.

    Reads every file twice if all is asked for.

    Raises ConfigError, BrokenCheckpoint.
    """
    reader = Reader(manifest)
    damage = [str(problem) for problem in manifest.damage(manifest.files)] if integrity else []
    weights = (
        Weights(reader.config, reader.full, str(manifest.folder), guide=reader.guide)
        if damage
        else reader.weights()
    )
    tree = {
        "checkpoint": str(manifest.folder),
        "origin": manifest.origin,
        **position(manifest, reader.config, weights.alpha),
        "tensors": list(manifest.kinds),
        "data_fingerprint": manifest.data_fingerprint,
        "revision": manifest.revision,
        "versions": manifest.versions,
        **model(weights, spectra=spectra and not damage),
        "splits": {
            "tensor_parallel": manifest.tensor_parallel,
            "files": len({piece.file for pieces in manifest.pieces.values() for piece in pieces}),
            "bytes": manifest.bytes,
            "layers": splits(reader.config, manifest.tensor_parallel, guide=reader.guide),
        },
    }
    if integrity:
        tree["damage"] = damage
    return tree


def position(manifest: Manifest, config: Config, alpha: float) -> dict[str, Any]:
    """Step, phase and the weight of the guide: of the next step to run, or "finished"."""
    run_schedule, step = schedule.build_schedule(config), manifest.step
    over = step >= run_schedule.total_steps
    return {
        "step": step,
        "total_steps": run_schedule.total_steps,
        "phase": "finished" if over else run_schedule.at(step).phase,
        "alpha": alpha,
        "optimizer_steps": manifest.optimizer_steps,
        "guide_optimizer_steps": manifest.guide_optimizer_steps,
    }


def model(weights: Weights, *, spectra: bool = True) -> dict[str, Any]:
    """What is the same for every format: sizes, parameters by part, spectra."""
    config = weights.config
    tree: dict[str, Any] = {
        "model": config.model.model_dump(mode="json"),
        "ffn": {**config.ffn.model_dump(mode="json"), "width": config.ffn_width},
        "parameters": {**counts.parameters_by_part(config), "total": counts.parameters(config)},
    }
    if weights.guide:
        tree["parameters"]["guide"] = counts.guide_parameters(config)
    if spectra:
        tree["spectra"] = list(spectrum(weights))
    return tree


def splits(config: Config, p: int, *, guide: bool) -> dict[str, list[dict[str, Any]]]:
    """Tensors of each kind of layer: full shape, one rank's, and along which dimension it is cut first
    (-1: replicated).
    """
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for layer in range(config.model.layers):
        kind = config.kind_of_layer(layer)
        if kind not in by_kind:
            by_kind[kind] = [
                {
                    "name": name,
                    "shape": list(spec.shape),
                    "rank_shape": list(spec.local_shape(p)),
                    "cut": spec.partition_dim(p) if p > 1 else -1,
                }
                for name, spec in layer_tensors(config, layer, guide=guide).items()
            ]
    return by_kind


def spectrum(weights: Weights) -> Iterator[Spectrum]:
    """Of every feed-forward linear, one matrix in memory at a time."""
    dense = merged(weights)
    for layer in range(weights.config.model.layers):
        structure = ffn_structure(weights.config, layer)
        for linear, _, inputs, outputs in ffn_linears(weights.config):
            values = singular_values(dense.full(f"decoder.layers.{layer}.mlp.{linear}.weight"))
            most = min(inputs, outputs)
            bound = (
                most if structure.dense or weights.guide else min(most, structure.bottleneck(inputs, outputs))
            )
            share = (values / values.sum().clamp_min(1e-300)).clamp_min(1e-300)
            yield Spectrum(
                layer=layer,
                linear=linear,
                kind=structure.kind,
                bound=bound,
                largest=math.sqrt(values[-1]),
                smallest=math.sqrt(values[-bound]),
                stable_rank=float(values.sum() / values[-1].clamp_min(1e-300)),
                effective_rank=float((-(share * share.log()).sum()).exp()),
            )


def singular_values(matrix: Tensor) -> Tensor:
    """Squares of the singular values, ascending, in float64, by the smaller Gram matrix: a tenth of an
    SVD's time. nan for nan.
    """
    if not torch.isfinite(matrix).all():
        return torch.full((min(matrix.shape),), math.nan, dtype=torch.float64)
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.t()
    return torch.linalg.eigvalsh(wide.double() @ wide.double().t()).clamp_min(0.0)


# -------------------------------------------------------------------------------------------------- as a page


def render(tree: dict[str, Any]) -> str:
    """The tree as a page for a terminal."""
    lines = [*_heading(tree), "", "parameters", *_numbers(tree["parameters"])]
    if "splits" in tree:
        split = tree["splits"]
        lines += [
            "",
            f"splits: {split['tensor_parallel']} tensor-parallel ranks, {split['files']} files, "
            f"{split['bytes'] / 1e6:,.1f} MB",
        ]
        for kind, tensors in split["layers"].items():
            lines.append(f"  a {kind} layer")
            lines += [_split(tensor) for tensor in tensors]
    if "spectra" in tree:
        lines += [
            "",
            "spectra: layer, linear, most ranks, largest and smallest singular value, stable and "
            "effective rank",
        ]
        lines += [
            f"  {s.layer:>3} {s.linear:<10} {s.kind:<13} {s.bound:>6} {s.largest:>10.4g} {s.smallest:>10.4g} "
            f"{s.stable_rank:>8.1f} {s.effective_rank:>8.1f}"
            for s in tree["spectra"]
        ]
    if "damage" in tree:
        lines += ["", "integrity: " + ("every file has its sha256" if not tree["damage"] else "DAMAGED")]
        lines += [f"  {problem}" for problem in tree["damage"]]
    return "\n".join(lines)


def _heading(tree: dict[str, Any]) -> Iterator[str]:
    if "checkpoint" in tree:
        yield f"{tree['checkpoint']}: {'+'.join(tree['tensors'])}" + (
            f", from {tree['origin']}" if tree["origin"] else ""
        )
        guide = f", alpha {tree['alpha']:.4f}" if tree["alpha"] else ""
        yield (
            f"  step {tree['step']:,} of {tree['total_steps']:,}, {tree['phase']}{guide}; Adam's steps "
            f"{tree['optimizer_steps']:,}"
        )
        yield f"  data {tree['data_fingerprint'] or 'unknown'}"
        yield (
            f"  code {tree['revision'] or 'unknown'}; "
            f"{', '.join(f'{k} {v}' for k, v in tree['versions'].items())}"
        )
    else:
        yield tree["origin"]
    yield "  model  " + ", ".join(
        f"{key} {value}" for key, value in tree["model"].items() if value is not None
    )
    yield "  ffn    " + ", ".join(f"{key} {value}" for key, value in tree["ffn"].items() if value is not None)


def _numbers(parts: dict[str, int]) -> Iterator[str]:
    for name, count in parts.items():
        yield f"  {name:<16} {count:>16,}"


def _split(tensor: dict[str, Any]) -> str:
    shape, own = (" x ".join(map(str, tensor[key])) for key in ("shape", "rank_shape"))
    return f"    {tensor['name']:<36} {shape:>16}  " + (
        f"cut to {own}" if tensor["cut"] >= 0 else "on every rank"
    )
