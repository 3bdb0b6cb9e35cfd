"""A structured linear's weights, which of their gradients are wanted, and the gradients."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LinearWeights(NamedTuple):
    """A linear's first and second factor, and its guide where that takes part."""

    first: Tensor
    second: Tensor
    guide: Tensor | None = None


class NeedsGrad(NamedTuple):
    """Whose gradients are wanted; what is frozen costs no product and no sum. The same on every rank."""

    x: bool = True
    first: bool = True
    second: bool = True
    guide: bool = True


class LinearGradients(NamedTuple):
    """What a backward pass returns; None for what was not wanted, and for a guide that took no part."""

    x: Tensor | None
    first: Tensor | None
    second: Tensor | None
    guide: Tensor | None
