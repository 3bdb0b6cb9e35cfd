"""Checkpoints from one form into another, and what is in them.

convert.py inspect DIR                   what it is: phase, step, parameters, splits, spectra, integrity
convert.py verify A B                    two checkpoints bit for bit, or two formats by their logits
convert.py reshard A B --tensor P        for P tensor-parallel ranks (x --data D)
convert.py to-hf A B --ffn merged        Llama or Starcoder2 for transformers; --ffn structured: the factors
convert.py from-hf A B [--ffn KIND ...]  a dense Llama, Starcoder2 or GPT-NeoX; its FFNs approximated
convert.py from-megatron A B [...]       a dense megatron-core GPT, torch_dist or mp_rank_XX
convert.py from-official A B             the paper's authors' .pth
convert.py to-deepspeed A B              DeepSpeed's universal format; from-deepspeed back

A is a checkpoint or a run (its newest), B must not exist. Nothing of what is read is executed.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sffn_dist import strict_json
from sffn_dist.checkpoint.manifest import BrokenCheckpoint, Manifest
from sffn_dist.checkpoint.run_folder import find_checkpoint
from sffn_dist.conversion.formats import IMPORTERS, format_of, is_checkpoint, weights_of
from sffn_dist.launch.error_output import print_errors
from sffn_dist.spec.config import ConfigError
from sffn_dist.structured.registry import structure_class, structured_kinds
from sffn_dist.structured.structure import SETTINGS

REFUSED, DIFFERENT = 2, 1  # exit codes


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="convert.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, act: Callable[[argparse.Namespace], int], *names: str) -> argparse.ArgumentParser:
        subparser = commands.add_parser(name)
        for place in names:
            subparser.add_argument(place, type=Path, metavar=place.upper())
        subparser.set_defaults(act=act)
        return subparser

    subparser = command("inspect", inspect, "source")
    subparser.add_argument(
        "--no-spectra", action="store_true", help="leave the singular values out, which take the longest"
    )
    subparser.add_argument("--json", action="store_true")
    subparser = command("verify", verify, "a", "b")
    subparser.add_argument("--logits", action="store_true", help="compare two checkpoints by logits too")
    subparser.add_argument(
        "--tolerance", type=float, default=1e-4, help="largest difference of logits (default 1e-4)"
    )
    subparser.add_argument("--json", action="store_true")
    subparser = command("reshard", reshard, "source", "target")
    subparser.add_argument("--tensor", type=_positive, required=True, help="tensor-parallel ranks")
    subparser.add_argument(
        "--data",
        type=_positive,
        default=1,
        help="data-parallel ranks, each with a file of its own (default 1)",
    )
    subparser = command("to-hf", to_hf, "source", "target")
    subparser.add_argument("--ffn", choices=("merged", "structured"), required=True)
    subparser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    subparser.add_argument(
        "--trim-vocab", action="store_true", help="leave out the rows that pad the vocabulary"
    )
    subparser.add_argument(
        "--shard-size", type=_gigabytes, default=5_000_000_000, metavar="GB", help="of a file (default 5)"
    )
    for source in IMPORTERS:
        subparser = command(f"from-{source.name}", import_from, "source", "target")
        if source.imports_dense:
            subparser.add_argument("--ffn", choices=structured_kinds(), help="default: stays dense")
            subparser.add_argument(
                "--pad-vocab-to-multiple",
                type=_positive,
                default=1,
                metavar="N",
                help="rows of zeros after the vocabulary, never sampled, such that N divides it",
            )
            subparser.add_argument("--rank", type=_positive)
            subparser.add_argument("--blocks", type=_positive)
            subparser.add_argument(
                "--dense-layers", type=_layers, help="layers that stay dense, 0,5 or none (default 0)"
            )
            subparser.add_argument(
                "--guide",
                action="store_true",
                help="keep the dense matrices as guides to start training with",
            )
        if source.takes_overrides:
            subparser.set_defaults(overrides=[])
            subparser.epilog = "key.path=value: of the config, where the source does not say"
    subparser = command("to-deepspeed", to_deepspeed, "source", "target")
    subparser.add_argument(
        "--tensor", type=_positive, default=1, help="tensor-parallel ranks that will load it (default 1)"
    )
    subparser = command("from-deepspeed", from_deepspeed, "source", "target")
    subparser.add_argument(
        "--config", metavar="FILE", help="of the run, where the source was not written by to-deepspeed"
    )
    subparser.set_defaults(overrides=[])
    subparser.epilog = "key.path=value: of the config"
    options, more = parser.parse_known_args(argv)
    if more and ("overrides" not in options or any(text.startswith("-") for text in more)):
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    if more:
        options.overrides = more
    if problem := _misfit(options):
        parser.error(problem)
    return options


def _misfit(options: argparse.Namespace) -> str | None:
    """Options that would be left unread."""
    given_names = [name for name in (*SETTINGS, "dense_layers", "guide") if getattr(options, name, None)]
    ffn = getattr(options, "ffn", None)
    for name in given_names:
        unread = not ffn or (name in SETTINGS and name not in structure_class(ffn).settings)
        if "ffn" in options and options.command.startswith("from-") and unread:
            return f"--{name.replace('_', '-')}: " + (
                f"--ffn {options.ffn} has no use for it" if options.ffn else "goes with --ffn"
            )
    if options.command == "from-deepspeed" and options.overrides and not options.config:
        return f"{options.overrides[0]}: goes with --config"
    return None


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number from 1 on")
    return int(text)


def _gigabytes(text: str) -> int:
    """Bytes."""
    try:
        return max(1, int(1e9 * float(text)))
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r}: must be a number of gigabytes") from None


def _layers(text: str) -> tuple[int, ...]:
    parts = [] if text == "none" else text.split(",")
    if not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}: must be none, or numbers of layers as in 0,5")
    return tuple(map(int, parts))


def inspect(options: argparse.Namespace) -> int:
    """Of a checkpoint everything, of other formats what the weights say."""
    from sffn_dist.conversion import inspection

    spectra = not options.no_spectra
    if is_checkpoint(options.source):
        tree = inspection.describe(find_checkpoint("source", str(options.source)), spectra=spectra)
    else:
        weights = weights_of(options.source)
        tree = {"origin": weights.origin, **inspection.model(weights, spectra=spectra)}
    print(strict_json.dumps(tree, indent=1, default=asdict) if options.json else inspection.render(tree))
    return DIFFERENT if tree.get("damage") else 0


def verify(options: argparse.Namespace) -> int:
    """0 where both hold the same."""
    from sffn_dist.conversion import verification

    tree: dict[str, Any] = {}
    both = is_checkpoint(options.a, options.b)
    if both:
        a, b = _intact(options.a), _intact(options.b)
        tree["differences"] = [asdict(difference) for difference in verification.differences(a, b)]
        tree["positions"] = verification.positions_differ(a, b)
    if options.logits or not both:
        tree["logits"] = asdict(verification.compare_logits(options.a, options.b))
    same = (
        not tree.get("differences")
        and not tree.get("positions")
        and tree.get("logits", {}).get("largest", 0.0) <= options.tolerance
    )
    print(
        strict_json.dumps({**tree, "same": same}, indent=1)
        if options.json
        else _verdict(tree, same, options.tolerance)
    )
    return 0 if same else DIFFERENT


def _verdict(tree: dict[str, Any], same: bool, tolerance: float) -> str:
    lines = []
    if "differences" in tree:
        differing = tree["differences"]
        lines += [f"tensors: {len(differing)} differ" if differing else "tensors: the same bits"]
        lines += [f"  {item['tensor']}: by {item['largest']:.3g} at most" for item in differing[:20]]
        lines += [f"  {text}" for text in tree["positions"]]
    if "logits" in tree:
        logits = tree["logits"]
        lines.append(
            f"logits: {logits['largest']:.3g} apart at most (tolerance {tolerance:g}), relative RMS "
            f"{logits['relative_rms']:.3g}, "
            f"the same likeliest token at {logits['same_choice']:.1%}"
        )
    return "\n".join([*lines, "the same" if same else "NOT the same"])


def reshard(options: argparse.Namespace) -> int:
    """The same tensors, cut for other ranks."""
    from sffn_dist.checkpoint import reshard as resharding

    manifest = resharding.reshard(
        _intact(options.source), options.target, tensor=options.tensor, data=options.data
    )
    print(
        f"{manifest.folder}: step {manifest.step}, {len(manifest.files)} files, "
        f"{manifest.bytes / 1e6:,.1f} MB"
    )
    return 0


def _intact(path: Path) -> Manifest:
    """The checkpoint in ``path``, every file of it read and compared with its hash."""
    manifest = find_checkpoint("source", str(path))
    if problems := manifest.damage(manifest.files):
        raise ConfigError([str(problem) for problem in problems])
    return manifest


def to_hf(options: argparse.Namespace) -> int:
    """A folder that transformers loads."""
    from sffn_dist.checkpoint.weights import trimmed
    from sffn_dist.conversion.hf import export

    if is_checkpoint(options.source):
        _intact(options.source)
    size, weights = options.shard_size, weights_of(options.source)
    padding = weights.config.model.vocab - weights.config.vocab_unpadded
    notices = weights.notices
    if options.trim_vocab:
        notices += () if padding else ("--trim-vocab: no row pads its vocabulary",)
        weights = trimmed(weights)
    elif padding:
        notices += (f"{padding} rows that pad the vocabulary go along; --trim-vocab leaves them out",)
    _print_notices(options.source, notices)
    folder = export.export(weights, options.target, ffn=options.ffn, dtype=options.dtype, shard_bytes=size)
    print(folder)
    return 0


def _print_notices(source: Path, notices: Sequence[str]) -> None:
    sys.stderr.writelines(f"convert.py: {source}: {notice}\n" for notice in notices)


def import_from(options: argparse.Namespace) -> int:
    """A checkpoint of a model from elsewhere, for ``init_from``."""
    from sffn_dist.checkpoint import reshard
    from sffn_dist.checkpoint.weights import approximated, padded

    expected, actual = options.command.removeprefix("from-"), format_of(options.source)
    if actual.name != expected:
        raise ConfigError([f"{options.source}: this is {actual.name}, not {expected}"])
    weights = actual.read(options.source, getattr(options, "overrides", ()))
    if getattr(options, "ffn", None):
        layers = (0,) if options.dense_layers is None else options.dense_layers
        sizes = {"kind": options.ffn, "rank": options.rank, "blocks": options.blocks, "dense_layers": layers}
        weights = approximated(weights, sizes, guide=options.guide)
    weights = padded(weights, getattr(options, "pad_vocab_to_multiple", 1))
    _print_notices(options.source, weights.notices)
    manifest = reshard.write_weights(weights, options.target)
    config = manifest.folder / reshard.START
    advice = f"to train on: pretrain.py --config {config} train.steps=... (or name it as base)"
    if problems := _training_problems(config):
        advice = f"to train on it, {config} needs changes first"
        print_errors("convert.py", problems)
    print(f"{manifest.folder}: {manifest.bytes / 1e6:,.1f} MB; {advice}")
    return 0


def _training_problems(start: Path) -> Sequence[str]:
    """Why a run with the config ``start`` would be refused: the trainer's own checks, tokenizer included."""
    from sffn_dist.data.tokenizer import load_tokenizer
    from sffn_dist.launch import checks
    from sffn_dist.spec import loading

    try:
        config = loading.load(start, ["train.steps=1"])
        checks.check_run(config, 1, starts=False)
        if config.data.tokenizer is not None:
            load_tokenizer(config.data, config.vocab_unpadded)
    except ConfigError as error:
        return error.problems
    return ()


def to_deepspeed(options: argparse.Namespace) -> int:
    """DeepSpeed's universal format, for its ``checkpoint.load_universal``."""
    from sffn_dist.conversion import universal

    print(universal.to_universal(_intact(options.source), options.target, tensor=options.tensor))
    return 0


def from_deepspeed(options: argparse.Namespace) -> int:
    """A universal checkpoint, as one to resume from: put it into run.dir/checkpoints."""
    from sffn_dist.conversion import universal
    from sffn_dist.spec import loading

    config = loading.load(options.config, options.overrides) if options.config else None
    manifest = universal.from_universal(options.source, options.target, config)
    print(
        f"{manifest.folder}: step {manifest.step}, {manifest.bytes / 1e6:,.1f} MB; to resume, name it "
        f"step_{manifest.step:08d} in a run's checkpoints"
    )
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0; 1 where contents differ or are damaged; 2 where the input is refused."""
    options = arguments(argv)
    _give_memory_back()
    try:
        target = getattr(options, "target", None)
        if target is not None and target.exists():
            raise ConfigError([f"{target}: exists already; nothing is overwritten"])
        return int(options.act(options))
    except (ConfigError, BrokenCheckpoint, OSError) as error:
        print_errors("convert.py", error.problems if isinstance(error, ConfigError) else [error])
        return REFUSED


def _give_memory_back() -> None:
    """glibc learns from freed blocks to keep such below 32 MiB for itself.

    A stream of tensors would then hold some of each size.
    """
    with contextlib.suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD


if __name__ == "__main__":
    sys.exit(main())
