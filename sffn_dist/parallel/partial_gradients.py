"""Gradients that a tensor-parallel rank has in part: under sequence parallelism, from its own tokens alone.

    norms, biases of row-parallel linears   marked sequence_parallel; hooks on the leaves sum them
                                            (collectives.sum_partial_gradients)
    factors that every rank holds           their linear sums them in its backward (split_linear.py)

Both are a small all-reduce for each parameter and micro-step, most of a step's collectives. :func:`defer`
leaves them out for a caller that makes one sum of all, once a step (training/partial_sums.py).
"""

from __future__ import annotations

from torch import nn

from sffn_dist.parallel.collectives import PARTIAL_SUMS
from sffn_dist.parallel.linears import StructuredLinear


def defer(model: nn.Module) -> list[nn.Parameter]:
    """From now on no backward pass of the model sums a partial gradient; the parameters that have one."""
    parameters = []
    for parameter, hook in model.__dict__.pop(PARTIAL_SUMS, []):
        hook.remove()
        parameters.append(parameter)
    for module in model.modules():
        if isinstance(module, StructuredLinear):
            parameters += module.defer_gradient_sums()
    return parameters
