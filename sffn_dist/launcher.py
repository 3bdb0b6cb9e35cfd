"""Who started this rank, and what it says of the others: torchrun's variables, or Slurm's put into them. Standard library only."""

from __future__ import annotations


def adopt() -> None:
    """Put what Slurm says into the variables that torchrun sets."""
