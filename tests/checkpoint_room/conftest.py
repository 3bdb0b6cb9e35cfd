"""Models drawn at random, what a Megatron GPTModel computes with them, and pickles that would run
something.
"""

from __future__ import annotations

import functools
import importlib.util
import io
import os
import pickle
import subprocess
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sffn_dist.checkpoint.weights import Weights
from sffn_dist.spec import loading
from sffn_dist.spec.config import ConfigError
from sffn_dist.spec.split_table import ffn_linears, ffn_structure, model_tensors
from sffn_dist.structured import functional
from sffn_dist.structured.functional import to_dense

CASES = Path(__file__).with_name("hf_cases.py")
SIZES: dict[str, dict[str, Any]] = {
    "dense": {"kind": "dense"},
    "low_rank": {"kind": "low_rank", "rank": 5},
    "block_dense": {"kind": "block_dense", "rank": 8, "blocks": 4},
    "block_shuffle": {"kind": "block_shuffle", "blocks": 2},
}
MODEL = {
    "layers": 2,
    "width": 16,
    "heads": 4,
    "sequence": 12,
    "vocab": 37,
    "init_std": 0.3,
    "rope_base": 500,
    "norm_epsilon": 0.03,
}
TREE = {
    "model": MODEL,
    "ffn": {"width": 24},
    "train": {"steps": 1, "global_batch_size": 8, "micro_batch_size": 8},
}


def config_tree(kind: str = "dense", /, ffn: dict[str, Any] | None = None, **model: Any) -> dict[str, Any]:
    """The tree of a small model's config; ``model`` overrides its section."""
    return {**TREE, "model": {**MODEL, **model}, "ffn": {"width": 24, **SIZES[kind], **(ffn or {})}}


def drawn_weights(
    tree: dict[str, Any], *, guide: bool = False, alpha: float = 0.0, seed: int = 0, **more: Any
) -> Weights:
    """Every matrix as training starts it; biases, norms and guides moved away from there, so that each of
    them shows.
    """
    config = loading.from_tree(tree)
    generator = torch.Generator().manual_seed(seed)
    specs = model_tensors(config, guide=guide)
    tensors: dict[str, torch.Tensor] = {}
    for name, spec in specs.items():
        if name in tensors:
            continue
        prefix, _, leaf = name.rpartition(".")
        if len(spec.shape) == 1:
            tensors[name] = (1.0 if leaf == "weight" else 0.0) + 0.3 * torch.randn(
                spec.shape, generator=generator
            )
        elif ".mlp." in name:
            inputs, outputs = next(
                (i, o) for linear, _, i, o in ffn_linears(config) if prefix.endswith(linear)
            )
            structure = ffn_structure(config, int(name.split(".")[2]))
            factors = functional.draw(structure, inputs, outputs, config.model.init_std, generator)
            if f"{prefix}.guide" in specs:
                dense = to_dense(structure, factors)
                factors["guide"] = dense + 0.2 * torch.randn(dense.shape, generator=generator)
            tensors |= {f"{prefix}.{factor}": tensor for factor, tensor in factors.items()}
        else:
            tensors[name] = config.model.init_std * torch.randn(spec.shape, generator=generator)
    return Weights(config, tensors.__getitem__, "drawn", guide, alpha, **more)


@pytest.fixture(autouse=True, scope="session")
def _modules_of_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """transformers copies the code of a folder before it runs it: not into the user's home here.

    Nothing asks the network.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        if importlib.util.find_spec("transformers"):
            cache = str(tmp_path_factory.mktemp("modules"))
            patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", cache)
        yield


@pytest.fixture
def tree_of() -> Callable[..., dict[str, Any]]:
    return config_tree


@pytest.fixture(scope="session")
def drawn() -> Callable[..., Weights]:
    return drawn_weights


@pytest.fixture(scope="session")
def reference(ranks: Callable[..., Any]) -> Callable[[Weights, torch.Tensor], torch.Tensor]:
    """Logits (batch, S, vocab) of a Megatron GPTModel of this project with such weights, in fp32 on one
    rank.
    """

    def logits(weights: Weights, tokens: torch.Tensor) -> torch.Tensor:
        tensors = {name: weights.full(name).numpy() for name in weights.names()}
        tree = weights.config.model_dump(mode="json")
        got = ranks(1).run(
            CASES,
            "logits",
            tree=tree,
            tensors=tensors,
            guide=weights.guide,
            alpha=weights.alpha,
            tokens=tokens.numpy(),
        )
        return torch.from_numpy(got[0])

    return logits


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, MODEL["vocab"], (2, 12), generator=torch.Generator().manual_seed(5))


# ----- pickles


class Calls:
    """An object whose pickle says to call something."""

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


class CallingDict(dict[str, str]):
    """A dictionary of that kind."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.system, (self["command"],)


def harm(marker: Path) -> dict[str, Any]:
    """Objects that write ``marker`` when they are unpickled."""
    command, code = f"touch {marker}", f"open({str(marker)!r}, 'w').close()"
    return {
        "os.system": Calls(os.system, command),
        "eval": Calls(eval, code),
        "exec": Calls(exec, code),
        "check_call": Calls(subprocess.check_call, ["touch", str(marker)]),
        "open": Calls(open, str(marker), "w"),
        "nested": {"a": [OrderedDict(b=(1, {"c": Calls(os.system, command)}))]},
        "dict subclass": CallingDict(command=command),
        "pickle in a pickle": Calls(pickle.loads, pickle.dumps(Calls(os.system, command))),
    }


def parts_of_harm(folder: Path) -> dict[str, Any]:
    """Calls that do no harm by themselves, but are no business of a file of weights."""
    return {
        "partial": Calls(functools.partial, os.system, f"touch {folder / 'executed'}"),
        "getattr": Calls(getattr, "x", "upper"),
        "import": Calls(__import__, "this"),
        "torch.load": Calls(torch.load, str(folder / "no_such_file")),
        "torch.hub": Calls(torch.hub.set_dir, str(folder)),
        "Path": Calls(Path.touch, folder / "executed"),
    }


def _all(folder: Path) -> dict[str, Any]:
    return {**harm(folder / "executed"), **parts_of_harm(folder)}


@pytest.fixture(params=sorted(_all(Path())))
def payload(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """An object that must not be unpickled."""
    return _all(tmp_path)[request.param]


@pytest.fixture(params=sorted(harm(Path())))
def harmful(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """An object that writes tmp_path/executed when it is."""
    return harm(tmp_path / "executed")[request.param]


@pytest.fixture
def repickled() -> Callable[[Path, Callable[[bytes], bytes]], bytes]:
    """A torch file's bytes with its pickle changed and the archive around it intact, so that the change is
    met by the unpickler.
    """

    def change(path: Path, how: Callable[[bytes], bytes]) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(path) as source, zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as target:
            for entry in source.infolist():
                data = source.read(entry)
                target.writestr(entry.filename, how(data) if entry.filename.endswith("data.pkl") else data)
        return buffer.getvalue()

    return change


@pytest.fixture
def refused(tmp_path: Path) -> Callable[[Callable[[], Any]], str]:
    """See that a reader raises ConfigError and that nothing was executed; gives the message."""

    def check(read: Callable[[], Any]) -> str:
        with pytest.raises(ConfigError) as caught:
            read()
        assert not (tmp_path / "executed").exists(), "the pickle was executed"
        return str(caught.value)

    return check
