"""Memory of a rank, for the plan and for ``train.micro_batch_size = auto``. Standard library only.

The tensors are counted: activations.py says how those of a micro-batch are, and a test compares them with the
model's own. What a CUDA device holds besides is assumed.
"""

from __future__ import annotations

from sffn_dist.spec.activations import activation_bytes
from sffn_dist.spec.config import Config
from sffn_dist.spec.counts import largest_parameter_per_rank, parameters_per_rank, reduce_bucket

# Assumptions, which nobody has measured: this code has not run on a GPU yet. A device shows what it holds in
# torch.cuda.mem_get_info beside torch.cuda.memory_allocated.
CUDA_CONTEXT = 600 * 2**20  # bytes: the driver's context, loaded kernels, cuBLAS' workspace
NCCL_BUFFERS = 512 * 2**20  # bytes of all communicators' channels, where there is more than one rank
ALLOCATOR_SLACK = (
    0.05  # of the tensors' bytes: blocks that are larger than asked for, or that nothing fits into
)

BESIDES = ("cuda_context", "nccl_buffers", "allocator_slack")


def memory_per_rank(
    config: Config, precision: str, data_parallel: int, *, guide: bool, device: bool = False
) -> dict[str, int]:
    """Bytes a rank: weights, gradients, fp32 master weights and Adam moments under the ZeRO stage,
    activations.

    ``guide``: while the guide lasts, or without one. ``device``: on a CUDA device, with what that holds
    besides (``BESIDES``).
    """
    n, stage, low = (
        parameters_per_rank(config, guide=guide),
        config.zero.stage,
        2 if precision == "bf16" else 4,
    )
    share = [data_parallel if stage >= level else 1 for level in (3, 2, 1)]
    # DeepSpeed keeps fp32 master weights apart from the weights in ZeRO 1-3
    master = 4 if stage else 0
    memory = {
        "weights": n * low // share[0],
        "gradients": n * 4 // share[1],  # summed over micro-steps in fp32
        "optimizer": n * (8 + master) // share[2],
        "buffers": _reduced_at_once(config, precision, guide=guide),
        "activations": activation_bytes(config, precision, guide=guide, cuda=device),
    }
    if device:
        memory |= {
            "cuda_context": CUDA_CONTEXT,
            "nccl_buffers": NCCL_BUFFERS if data_parallel * config.parallel.tensor > 1 else 0,
            "allocator_slack": int(ALLOCATOR_SLACK * sum(memory.values())),
        }
    return {**memory, "total": sum(memory.values())}


def _reduced_at_once(config: Config, precision: str, *, guide: bool) -> int:
    """Bytes of gradients on their way into those sums: the largest one as its layer computes it, and buffers
    of what is reduced over the data-parallel ranks at once.
    """
    stage, low = config.zero.stage, 2 if precision == "bf16" else 4
    reduced = 4 if config.zero.reduces_in(precision) == "fp32" else 2
    bucket = {
        # a copy of the sums, and one in the dtype of the reduction
        1: 4 + (reduced if reduced != 4 else 0),
        # two of gradients, one fills while the other is reduced, and one in the dtype of the reduction
        2: 2 * low + (reduced if reduced != low else 0),
        # one in the dtype of the reduction, and what came of it in fp32
        3: reduced + (4 if reduced != 4 else 0),
    }[max(stage, 1)]
    arriving = low * largest_parameter_per_rank(config, guide=guide) if stage >= 2 or low == 2 else 0
    return arriving + bucket * reduce_bucket(config, guide=guide)
