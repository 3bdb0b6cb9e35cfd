"""Hooks on linears that are computed without being called."""

from __future__ import annotations

from typing import Any

from sffn_dist.parallel import ledger
from sffn_dist.parallel.linears import StructuredLinear


def is_unhooked(linear: StructuredLinear) -> bool:
    """True if nobody waits for the linear to be called: but the ledger, which handles it, and data
    parallelism (:func:`run_weight_hooks`).
    """
    hooks = [
        linear._forward_pre_hooks,
        linear._forward_hooks,
        linear._backward_hooks,
        linear._backward_pre_hooks,
    ]
    return all(
        _from(hook, "megatron.core.distributed", ledger.__name__)
        for registered in hooks
        for hook in registered.values()
    )


def _from(hook: Any, *modules: str) -> bool:
    return (getattr(getattr(hook, "func", hook), "__module__", None) or "").startswith(modules)


def run_weight_hooks(linear: StructuredLinear) -> None:
    """The linear is not called, so call what Megatron's data parallelism hooked before it: it may still be
    gathering the weights.
    """
    for hook in list(linear._forward_pre_hooks.values()):
        if _from(hook, "megatron.core.distributed"):
            hook(linear)
