"""The tensors of a Hugging Face folder, by their names there: safetensors or torch's files, sharded or not.

Both are read lazily, and of torch's files, which are pickles, nothing is run (conversion/pickles.py).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sffn_dist.conversion import downloads, pickles
from sffn_dist.conversion.hf.config_json import read_object, shown
from sffn_dist.spec.config import ConfigError

# the first that is there is read
FORMATS = (("model.safetensors", ".safetensors"), ("pytorch_model.bin", ".bin"))
FLOATS = {"F64", "F32", "F16", "BF16"}


class _File(Protocol):
    """An open file of tensors."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape."""

    def other_types(self) -> dict[str, str]:
        """The types of those that are not plain tensors of floating-point numbers."""

    def get(self, name: str) -> Tensor:
        """A tensor, a copy in fp32."""


class _Safetensors:
    def __init__(self, path: Path):
        self._file = safe_open(path, framework="pt")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        names = list(self._file.keys())
        return {name: tuple(self._file.get_slice(name).get_shape()) for name in names}

    def other_types(self) -> dict[str, str]:
        types = {name: self._file.get_slice(name).get_dtype() for name in self._file.keys()}  # noqa: SIM118
        return {name: kind for name, kind in types.items() if kind not in FLOATS}

    def get(self, name: str) -> Tensor:
        return self._file.get_tensor(name).to(torch.float32, copy=True)


class _Pickled:
    def __init__(self, path: Path):
        tree = pickles.load(path)
        if not isinstance(tree, dict) or not all(
            isinstance(k, str) and isinstance(v, Tensor) for k, v in tree.items()
        ):
            raise ConfigError([f"{path}: holds something other than tensors by name"])
        self._tensors = tree

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def other_types(self) -> dict[str, str]:
        plain = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
        odd = {
            n: t
            for n, t in self._tensors.items()
            if t.dtype not in plain or t.layout != torch.strided or t.is_meta
        }
        return {name: f"{tensor.dtype}, {tensor.layout}, {tensor.device}" for name, tensor in odd.items()}

    def get(self, name: str) -> Tensor:
        return self._tensors[name].detach().to(torch.float32, copy=True)


class Tensors:
    """Every tensor of a folder; shapes are known, contents are read when asked for."""

    def __init__(self, folder: Path):
        """Raises ConfigError naming the file that is missing, incomplete or not what it should be."""
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.other_types: dict[str, str] = {}  # of tensors that are not floating-point numbers
        self._place: dict[str, _File] = {}
        weight_map, single = _where(folder)
        self.unnamed: list[str] = []  # in a file, though the index does not name them
        for file in dict.fromkeys(weight_map.values()) if weight_map is not None else (single,):
            opened = _open(folder / file)
            self.other_types |= opened.other_types()
            for name, shape in opened.shapes().items():
                if weight_map is not None and weight_map.get(name) != file:
                    self.unnamed += [f"{name} in {file}"] if name not in weight_map else []
                    continue  # the index does not send us here for it
                self.shapes[name], self._place[name] = shape, opened
        for name, file in (weight_map or {}).items():
            if name not in self.shapes:
                raise ConfigError([f"{folder / file}: {name} is not in it, though the index says so"])

    def get(self, name: str) -> Tensor:
        """A tensor, a copy in fp32."""
        return self._place[name].get(name)


def _where(folder: Path) -> tuple[dict[str, str] | None, str]:
    """(tensor -> file by the index, "") or (None, the only file)."""
    for single, _ in FORMATS:
        if (folder / single).exists():
            return None, single
        index = folder / f"{single}.index.json"
        if index.exists():
            return _weight_map(index), ""
    raise ConfigError(
        [f"{folder}: holds neither {' nor '.join(single for single, _ in FORMATS)}, nor the index of one"]
    )


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConfigError(
            [f"{index}: weight_map = {shown(weight_map)}: must say in which file each tensor is"]
        )
    suffixes = tuple(suffix for _, suffix in FORMATS)
    for file in weight_map.values():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(suffixes):
            raise ConfigError(
                [
                    f"{index}: weight_map names {shown(file)}: must be a {' or '.join(suffixes)} file of "
                    f"this "
                    f"folder"
                ]
            )
    missing = sorted({file for file in weight_map.values() if not (index.parent / file).exists()})
    if missing:
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        raise ConfigError([f"{index}: names {', '.join(missing[:4])}{more}, which the folder lacks"])
    return weight_map


def _open(path: Path) -> _File:
    opener: Callable[[Path], _File] = _Safetensors if path.suffix == ".safetensors" else _Pickled
    try:
        if not path.is_file():
            raise FileNotFoundError("no such file")
        (downloads.check_safetensors if opener is _Safetensors else downloads.check)(path)
        return opener(path)
    except ConfigError:
        raise
    except (SafetensorError, OSError, ValueError) as error:
        raise ConfigError([f"{path}: cannot be read: {_first_line(error)}"]) from None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
